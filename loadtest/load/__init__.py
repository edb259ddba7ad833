"""Load on a running endpoint in the shapes that matter: how long users wait, and what paging does."""
