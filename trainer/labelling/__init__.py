"""The page where a person writes captions, and what stands behind it.

`answers` keeps what was answered, `session` knows which image comes next and who is at it,
`proposals` what a model would say, `refits` starts training beside it, `server` speaks HTTP,
`label_files` and `label_studio` take labels over from other tools and hand them on.
"""
