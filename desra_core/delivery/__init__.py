"""Write the best picture of every photo: the GAN result, with the MSE result in the place of its artifacts."""
