"""How a student UNet is made from a teacher and a plan. Knows nothing of training."""
