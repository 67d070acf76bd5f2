"""A finished run on the model hub.

    card.py       the model card, from what the run recorded
    licences.py   what is known of the licences of student and teacher
    files.py      which files of a run are uploaded, which are not, and which forbid it
    push.py       the upload: one commit, tried again where that can help, and checked

Nothing here loads torch.
"""
