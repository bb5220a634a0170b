"""Files of object stores and web servers, read by their addresses (extra ``remote``)."""
