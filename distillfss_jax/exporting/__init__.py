"""Programs as files for others: any jitted function, its weights inside.

Nothing here knows a model: what is written is a function of arrays, and a
record of what its user should know about it.
"""
