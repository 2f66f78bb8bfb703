"""The verifier: hosts the target model and judges guesses."""
