"""What ``compose``, ``truncate``, ``rescale``, ``compare`` and the spectra share."""
