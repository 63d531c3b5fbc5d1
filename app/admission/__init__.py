"""Admission: who waits, who goes, and the right to one slot of one worker until it is given back."""
