"""How the playground's pictures are drawn and compared, the same for its pairs, its reports and its table."""

NUM_INFERENCE_STEPS = 20
TIE_MARGIN = 0.02
