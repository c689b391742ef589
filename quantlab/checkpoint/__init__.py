"""Safetensors in and out: headers, index, reader, writer, tokenizer, and downloads from the hub."""
