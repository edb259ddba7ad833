"""What a small model allows in a question to the index."""

from forepage.index.question import QuestionLimits

LIMITS = QuestionLimits(
    max_blocks=16,
    max_position=4096,
    num_c4_layers=3,
    index_heads=2,
    index_dims=4,
    num_target_layers=2,
    hidden_size=8,
    default_threshold=0.4,
)
