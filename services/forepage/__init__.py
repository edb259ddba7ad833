"""forepage: DeepSeek-V4 at long context with lookahead paging of the compressed KV."""
