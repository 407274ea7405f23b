"""The tokenizer as a codec: pictures of any size as bits, and the files that hold them."""
