# Adapts a trained model to your own texts in minutes. Sizes and patcher come from the checkpoint.
#        python prepare.py my_texts/ --name=mine && python train.py config/finetune.py
init_from = "out/quick/best.pt"
dataset = "mine"
out_dir = "out/finetune"
max_iters = 300

learning_rate = 0.0025  # lower than in training: the weights are good already
adam_learning_rate = 0.001
batch_size = 2
eval_interval = 100
