"""What the scripts that train small vision-language models share."""
