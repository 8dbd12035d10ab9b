"""Reading a store.

index     which buckets exist, and where each chunk lies
store     what a user opens: sites, statistics, arrays
values    rows as values, whatever they are stored as
rows      rows by number
sequences whole sequences
"""
