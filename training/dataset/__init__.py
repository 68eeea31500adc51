"""The data set of the built-in model: facts, refusals, JSON and tool tasks, and the chats made of them.

topics.txt, differences.txt, questions.txt   everything the model knows, written by hand
phrasings.py                                 how people ask: templates, follow-ups, noise
facts.py                                     the text files and the templates → Question
outside.py                                   questions that the model must decline
json_tasks.py, tool_tasks.py                 generated tasks whose answers are copied, not remembered
conversations.py                             the endless training stream and the fixed evaluation cases

Whatever is held out for evaluation is held out here, in one place per module, and never drawn for training.
"""
