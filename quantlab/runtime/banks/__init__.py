"""Banks: the matrices of a layer as the runtime holds and multiplies them.

A *bank* holds E matrices [N, K] of one shape and one number format: the routed experts of a layer (E of them) or a
single linear (E = 1). Every bank implements `products(x, groups)`: rows of activations, sorted by matrix, times these
matrices. Linears, MLPs and experts use nothing else of a bank, so each is written once for dense and quantized weights.

On the CPU the fastest way to multiply depends on the number of rows and the dtype of the activations:

- With one row, a product is bound by reading its matrix, so torch's packed operators multiply the integers as stored.
  They are fast for bfloat16 activations only (float16 and float32 take scalar loops, 10 to 40 times slower), so
  activations are rounded to bfloat16.
- With many rows, a product is bound by arithmetic. The packed operators are then slower than expanding a band of rows
  to floating point, multiplying by it and discarding it. A band fits into the cache; a whole expanded matrix is never
  kept.
- With float32 activations, results must be exact, because quality is measured with them. Weights are always expanded:
  ``x @ (q * scale)^T``, with ``q * scale`` formed as the format defines it (`QuantizedMatrix.dequantize`).
- x86 has no float16 arithmetic before AVX512-FP16: beyond a few rows a float16 matrix is expanded to float32 in bands.

If the native kernels (`quantlab.runtime.native`) are available, they compute products of few rows, at memory bandwidth
and for all groups in one call. Otherwise torch's operators do, as described above.

Legend: E matrices, N rows (outputs), K columns (inputs), g columns per scale, G = K / g, T rows of activations.

`choice` selects a bank. The banks are in `dense`, `int4_native`, `int4_torch`, `int8`, `expanded` (the fallback) and
`quantlab.runtime.cuda.banks`.
"""
