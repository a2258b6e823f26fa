"""What finetuning changed on held-out images: artifacts gone and added, fidelity elsewhere, and whether that passes."""
