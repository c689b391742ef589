"""The format `gguf`: one file for llama.cpp, with tokenizer and chat template. Does not import torch.

Sources: the converter and the model loaders of llama.cpp (release 0.3.36 of llama-cpp-python contains them): `conversion/`,
`src/models/{llama,qwen2,qwen3,deepseek2}.cpp`, `src/llama-model.cpp`, `src/llama-vocab.cpp`, `src/llama-context.cpp`.
"""
