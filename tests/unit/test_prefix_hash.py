"""Equal keys mean equal prefixes, of one model and one tenant."""

from forepage.kv.prefix_hash import PrefixHasher, resume_key, salted_key


def keys(tokens: list[int], **who: str) -> list[bytes]:
    return PrefixHasher(who.get("fingerprint", "m"), 4, who.get("salt", "")).block_keys(tokens)


def test_keys_cover_full_blocks_only_and_chain() -> None:
    tokens = list(range(11))
    assert len(keys(tokens)) == 2
    assert keys(tokens)[:1] == keys(tokens[:4])
    changed = [99, *tokens[1:]]
    assert not set(keys(tokens)) & set(keys(changed)), "an early change reaches every later key"


def test_keys_differ_by_model_salt_kind_and_sequence() -> None:
    tokens = list(range(4))
    key = keys(tokens)[0]
    others = [
        keys(tokens, fingerprint="other")[0],
        keys(tokens, salt="tenant")[0],
        resume_key(key, 0),
        resume_key(key, 1),
        salted_key(key, "a/1"),
        salted_key(key, "a/2"),
    ]
    assert len({key, *others}) == len(others) + 1
    assert all(len(other) == 32 for other in others)


def test_token_boundaries_are_not_ambiguous() -> None:
    assert keys([0x01, 0, 0, 0]) != keys([0, 0x01, 0, 0])
    assert keys([256, 0, 0, 0]) != keys([0, 1, 0, 0])
