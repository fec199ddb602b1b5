"""What a person looks at: metrics with intervals, figures, tables and the summary of a run.

Nothing here knows of models or torch: arrays and names come in, files go out, each written whole or not at all.
"""
