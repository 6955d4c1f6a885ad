"""The embedded model and videos behind `latentline demo`."""
