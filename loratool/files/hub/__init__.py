"""Models and adapters of the Hugging Face hub: their names, the local cache, and the network.

The cache is searched without the network and without ``huggingface_hub``, which is imported only
where something has to be fetched.
"""
