"""What an adapter is, read from headers: sites, slots, scaling, extras, configuration."""
