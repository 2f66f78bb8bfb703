"""The drafter: guesses ahead of the target. Everything it holds can be dropped and rebuilt."""
