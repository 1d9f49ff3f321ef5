"""The study: claims of a paper measured on any list of models, with verdicts written beforehand."""
