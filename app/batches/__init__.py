"""Batches: files and the Batch API. Storage holds the truth, written once and never changed; Redis only says who works
on what."""
