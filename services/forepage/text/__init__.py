"""Text in and out of token ids: tokenizer, chat encoding, incremental detokenising. No torch."""
