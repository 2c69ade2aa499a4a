"""Every numerical tolerance of the suite, once, with its reason. Never loosened to make a test pass.

Append `NAME = value  # reason`; absolute unless the reason says relative.
"""

GOLDEN_FP64 = 1e-10  # against the official code's float64 values: sums in another order, same formulas
EXACT_FP64 = 1e-12  # two float64 evaluations of one formula, values of order 1
CHAIN_RULE = 1e-6  # block size 1 against the same model's own chain rule
GRID_LOSS = 1e-6  # relative; fp32 sums in another order on another grid, losses of about 4
GRID_NORM = 2e-6  # relative; a sum of squares over all parameters, in another order
GRID_NORMS_LATER = (
    1e-4  # relative; gradient norms of steps 2 to 5: the parameters have drifted by up to GRID_PARAMETERS
)
GRID_GRADIENT = 5e-6  # relative to the tensor's largest gradient; fp32, a few hundred terms in another order
GRID_PARAMETERS = (
    1e-5  # after 5 AdamW steps at lr 1e-3: Adam divides by sqrt(v), which magnifies rounding of small gradients
)
SPLIT_LOSS = 1e-7  # relative; per-sample sums are fp64 and in one order, but products of another batch round in fp32
EVALUATION = 1e-5  # one perplexity computed by fp32 forwards in another order (nats per token)
FAST_PATH_FP64 = (
    1e-12  # a fast attention path against the reference, outputs and gradients: the same sums in another order
)
FAST_PATH_FP32 = 1e-5  # the same in fp32, relative to the largest value of the tensor compared
FAST_PATH_BF16 = 2e-2  # the same in bf16, relative: inputs, probabilities and partial sums carry 8 bits
RESUMED = 1e-5  # losses and gradient norms (about 4) of 5 steps after a change of grid: fp32 sums in another order
SEARCH_VARIANCE = 1e-5  # relative; variance of some hundred block losses whose fp32 forwards round in another order
# relative; losses of the first ten steps at lr 1e-3: the parameters have drifted apart by up to GRID_PARAMETERS
GRID_LOSSES_LATER = 1e-5
CACHED_FP64 = (
    1e-12  # the decoding engine against the training-mask forward: the same rows with other neighbours in a product
)
CACHED_FP32 = 1e-5  # the same in fp32, logits of order 1
ROTATED_FAR = 1e-6  # fp32 attention scores of one distance, near and 10^5 positions away: fp32 tables of exact angles
FOREIGN_LOGITS = 1e-5  # logits of one model in transformers and here, fp32: sums in another order
PEAK_MEMORY = (
    0.10  # relative; predicted peak of a step against tensors alive: temporaries inside kernels are not modelled
)
HEAD_BF16_NLL = 1e-5  # nats; fp32 sums of exact products of bf16 inputs against fp64, logits of order 10
HEAD_BF16_SUM = 2e-6  # of the largest; some hundred exact products added in fp32, against fp64
HEAD_BF16_GRADIENT = 3 * 2**-9  # of the largest; logits' gradients, result and its scaling are each rounded to bf16
ROWS_FP32 = 5e-7  # of the largest; norms, rotary turns and activations in fp32 against fp64: a few roundings of 2^-24
ROWS_BF16 = 3 * 2**-9  # of the largest; the same in bf16: the result and up to two steps before it are rounded
# relative to the largest; each of the ranks' partial sums is rounded to bf16 (2^-9), as the first summand is
GRADIENTS_SENT_IN_BF16 = 4 * 2**-9

SMALLEST_CHOICE_GAP = 2e-6
"""Between the scores of the last chosen and the first left-out expert (or group) of any row of a parity test. Scores of two
grids differ by about 1e-7, and by more after steps whose parameters differ by up to 1e-6."""
