"""Training: what a step computes, the step, the loop, evaluation, and the job around them."""
