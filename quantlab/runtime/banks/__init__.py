"""Banks: the matrices of a layer as the runtime holds and multiplies them.

A *bank* holds E matrices [N, K] of one shape and one number format: the routed experts of a layer (E of them) or a
single linear (E = 1). Every bank implements `products(x, groups)`: rows of activations, sorted by matrix, times these
matrices. Linears, MLPs and experts use nothing else of a bank, so each is written once for dense and quantized weights.

On the CPU the fastest way to multiply depends on the number of rows, the dtype of the activations and the processor:

- With one row, a product is bound by reading its matrix, so the integers are multiplied as stored. The native kernels
  (`quantlab.runtime.native`) do so at memory bandwidth, for all groups in one call. Without them torch's packed
  operators do; they are fast for bfloat16 activations only (float16 and float32 take scalar loops, 10 to 40 times
  slower), so activations are rounded to bfloat16.
- With many rows, a product is bound by arithmetic. A band of rows of the matrix is expanded to floating point,
  multiplied by torch's matmul and overwritten by the next (`dense_product.in_bands`). A band fits into the cache; a
  whole expanded matrix is never kept. Bands are in bfloat16 for 16-bit activations if the processor has bfloat16
  products, else in float32, because bfloat16 products without instructions for them are several times slower.
- "Many" is a constant of each bank, and 16 rows on processors with matrix units (AMX). `quantlab.runtime.processor`
  reads the processor's flags; nothing is chosen by a timing.
- With float32 activations, results must be exact, because quality is measured with them. Weights are always expanded:
  ``x @ (q * scale)^T``, with ``q * scale`` formed as the format defines it (`QuantizedMatrix.dequantize`).
- x86 has no float16 arithmetic before AVX512-FP16: beyond a few rows a float16 matrix is expanded to float32 in bands.

Legend: E matrices, N rows (outputs), K columns (inputs), g columns per scale, G = K / g, T rows of activations.

`choice` selects a bank. The banks are in `dense`, `int4_native`, `int4_torch`, `int8`, `expanded` (the fallback) and
`quantlab.runtime.cuda.banks`.
"""
