"""Of the mini models: ``python -m mscke.pretraining`` (``make pretrain``)."""
