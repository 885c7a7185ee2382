"""What a latent action model looks at, as numbers and as pictures."""
