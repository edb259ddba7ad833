"""In which form a worker holds each tensor of a checkpoint, and so in how many bytes; no torch.

Plain tensors are held in the dtype they are computed with. Quantised ones are dequantised, or held as they
are stored: then an FP8 or MXFP4 matrix keeps its values and its scales, under the checkpoint's own names.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from forepage.model.stored_form import Form, Span, StoredTensor, allowed_forms, stored_parts
from forepage.model.weight_table import Role, WeightEntry, fixed_dtype
from forepage.settings import WeightDtype

_KEPT_FORMS = {Role.LINEAR: Form.FP8, Role.EXPERT: Form.FP4}
"""What the model computes with as stored; base models' FP8 experts are dequantised."""
_WORD_COLUMNS = {Form.FP8: 2, Form.FP4: 32}
"""A kept matrix has a multiple of so many columns."""


@dataclass(frozen=True)
class HeldForm:
    """`plain`: dtype of plain matrices; `keeps_stored`: whether quantised ones stay as they are."""

    plain: str
    keeps_stored: bool = False

    @classmethod
    def of(cls, dtype: WeightDtype, device: str = "cuda") -> "HeldForm":
        """What a setting that is not auto means on a device of this type."""
        if dtype is WeightDtype.STORED:
            return cls("F32" if device == "cpu" else "BF16", keeps_stored=True)
        return cls({WeightDtype.FP32: "F32", WeightDtype.BF16: "BF16"}[dtype])

    def keeps(self, entry: WeightEntry, dtype: str, span: Span) -> bool:
        """Whether a part, stored with values of `dtype`, is held as stored.

        It is where the part cuts no scale in two, so all ranks hold a tensor in the same form.
        """
        form = allowed_forms(entry.role)[dtype]
        if not self.keeps_stored or form is not _KEPT_FORMS.get(entry.role) or form.scales is None:
            return False
        if entry.shape[1] % _WORD_COLUMNS[form]:
            return False
        unit = (form.scales.rows, form.scales.columns)
        edges = zip((span.rows, span.columns), unit, entry.shape, strict=True)
        return all(
            part.start % size == 0 and (part.stop % size == 0 or part.stop == end)
            for part, size, end in edges
        )

    def parts(
        self, name: str, entry: WeightEntry, dtype: str | None, span: Span
    ) -> Iterator[tuple[str, StoredTensor]]:
        """Names, dtypes and shapes of what is held of a part; `dtype` None: it is in no file."""
        if dtype is not None and self.keeps(entry, dtype, span):
            yield from stored_parts(name, entry, dtype, span)
        else:
            yield name, StoredTensor(self.plain_dtype(entry.role, dtype), span.shape(len(entry.shape)))

    def plain_dtype(self, role: Role, dtype: str | None = None) -> str:
        """In which dtype a tensor is held plain, of a file that has it in `dtype` (None: it is in no file).

        What is multiplied in fp32 keeps all its bits: bf16 is enough where a release stores it so.
        """
        if role is Role.FP32_MATRIX and self.plain == "BF16" and dtype in (None, "BF16"):
            return "BF16"
        return fixed_dtype(role) or self.plain
