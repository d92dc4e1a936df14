"""The napari plugin: everything that knows napari or Qt lives here, and nothing here computes."""
