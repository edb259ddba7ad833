"""Where prefill chunks end and resume records are taken."""

from forepage.worker.prefill import is_resume_point, next_chunk_end


def chunk_ends(start: int, prompt: int, *, chunk: int = 512, every: int = 2048) -> list[int]:
    ends = []
    while start < prompt:
        start = next_chunk_end(start, prompt, chunk=chunk, resume_every=every, block=256)
        ends.append(start)
    return ends


def test_chunks_are_aligned_and_stop_at_the_last_full_block() -> None:
    assert chunk_ends(0, 1300) == [512, 1024, 1280, 1300]
    assert chunk_ends(0, 200) == [200]
    assert chunk_ends(0, 257) == [256, 257]
    assert chunk_ends(0, 512) == [256, 512], "one token is left to compute after a resume"


def test_chunks_after_a_resume_are_those_of_a_whole_prefill() -> None:
    whole = chunk_ends(0, 5000)
    for point in (256, 1024, 2048):
        rest = chunk_ends(point, 5000)
        assert [end for end in whole if end > point and end > rest[0]] == rest[1:]


def test_resume_points_are_the_long_stride_and_the_last_full_block() -> None:
    points = [n for n in range(0, 5001, 128) if is_resume_point(n, 5000, resume_every=2048, block=256)]
    assert points == [2048, 4096, 4864]
    assert all(point in chunk_ends(0, 5000) for point in points)
