"""Judges that are asked in words: masked names, the question, a strict reading of the reply."""
