"""Makes sentencepiece.json: a tokenizer that sentencepiece trained, as transformers writes it, and what sentencepiece says about it.

Run with transformers, tokenizers, sentencepiece and protobuf: `python make_sentencepiece.py CORPUS` with JSON lines of text.
"""

import io
import json
import sys
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers.convert_slow_tokenizer import generate_merges

TEXTS = (
    "The quick brown fox", " two  spaces ", "line\nbreak\ttab", "naïve Ω 漢字 🦊", "", "aaaa", "12345", "a<|tool|>b", "<s>x</s>",
    "don't — “quoted”", "x" * 40,
)  # fmt: skip

corpus = [json.loads(line)["text"] for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()][:60]
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus), model_writer=written, vocab_size=700, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.99, split_digits=True,
    allow_whitespace_only_pieces=True, user_defined_symbols=["<|tool|>"], num_threads=1, minloglevel=2,
)  # fmt: skip
model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
proto = sentencepiece_model_pb2.ModelProto.FromString(written.getvalue())
vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
tokenizer = Tokenizer(
    models.BPE(vocabulary, generate_merges(vocabulary), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
)
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
tokenizer.add_tokens([AddedToken("<|tool|>", normalized=False, special=False)])
tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
golden = {
    "made by": {"sentencepiece": sentencepiece.__version__},
    "tokenizer": json.loads(tokenizer.to_str()),
    "pieces": [[piece.piece, piece.score, piece.type] for piece in proto.pieces],
    "encoded": {text: model.encode(text) for text in TEXTS},
}
(Path(__file__).parent / "sentencepiece.json").write_text(
    json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8"
)
