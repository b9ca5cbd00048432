"""What the programs share, a concept to a file.

data            images and labels
text            characters
networks        classifiers
transformer     a decoder of characters
gan_networks    generators and discriminators
classify        training a classifier
adversarial     training a generator against a discriminator
scores          Inception score and FID by a classifier that is trained here
program         the command line: which runs there are, those that are left, plots
records         results as JSON lines
comparisons     what would show a claim
statistics      means, standard errors, intervals, verdicts
figures         bars, curves
"""
