"""Train an image classifier, as torchvision's references/classification/train.py does.

Without --data-path, on synthetic images, in seconds. Distributed under torchrun.
"""

import argparse
import os
import time

import torch
import torch.distributed
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from torchvision.transforms import v2

from czm_fused import FusedCZMSGD, convert, czm_param_groups


def train_one_epoch(model, criterion, optimizer, loader, device, epoch, args, ema, scaler):
    model.train()
    for i, (images, targets) in enumerate(loader):
        start = time.time()
        images, targets = images.to(device), targets.to(device)
        with torch.autocast(device.type, enabled=scaler is not None):
            outputs = model(images)
            loss = criterion(outputs, targets)

        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            if args.clip_grad_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            if args.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
            optimizer.step()

        if ema is not None:
            ema.update_parameters(model)
        if i % args.print_freq == 0:
            speed = len(images) / (time.time() - start)
            print(f"epoch {epoch} batch {i}: loss {loss.item():.4f}, {speed:.0f} images/s")


def evaluate(model, criterion, loader, device, label):
    model.eval()
    totals = torch.zeros(3, device=device)
    with torch.inference_mode():
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            outputs = model(images)
            loss = criterion(outputs, targets).item()
            correct = (outputs.argmax(dim=1) == targets).sum().item()
            totals += torch.tensor([loss * len(images), correct, len(images)], device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    loss, correct, count = totals.tolist()
    print(f"{label}: loss {loss / count:.4f}, accuracy {100 * correct / count:.2f} %")
    return correct / count


def load_data(args):
    normalize = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
    size = args.crop_size
    train = v2.Compose(
        [v2.ToImage(), v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *normalize]
    )
    val = v2.Compose([v2.ToImage(), v2.Resize(size * 8 // 7), v2.CenterCrop(size), *normalize])
    if args.data_path is None:
        images = [args.fake_images, (3, size, size), args.fake_classes]
        dataset = torchvision.datasets.FakeData(*images, transform=train)
        dataset_test = torchvision.datasets.FakeData(*images, transform=val)
        return dataset, dataset_test, args.fake_classes
    dataset = torchvision.datasets.ImageFolder(os.path.join(args.data_path, "train"), train)
    dataset_test = torchvision.datasets.ImageFolder(os.path.join(args.data_path, "val"), val)
    return dataset, dataset_test, len(dataset.classes)


def main(args):
    distributed = "WORLD_SIZE" in os.environ
    device = torch.device(args.device)
    if distributed:
        torch.distributed.init_process_group()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)

    dataset, dataset_test, num_classes = load_data(args)
    if distributed:
        train_sampler = DistributedSampler(dataset)
        test_sampler = DistributedSampler(dataset_test, shuffle=False)
    else:
        train_sampler = RandomSampler(dataset)
        test_sampler = SequentialSampler(dataset_test)
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    data_loader = DataLoader(dataset, sampler=train_sampler, **options)
    data_loader_test = DataLoader(dataset_test, sampler=test_sampler, **options)

    print("Creating model")
    model = torchvision.models.get_model(args.model, weights=None, num_classes=num_classes)
    model = convert(model)
    model.to(device)
    if distributed and args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    if args.opt.startswith("sgd"):
        optimizer = FusedCZMSGD(
            czm_param_groups(model),
            lr=args.lr,
            momentum=args.momentum,
            nesterov="nesterov" in args.opt,
        )
    elif args.opt == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay
        )
    else:
        raise ValueError(f"--opt must be sgd, sgd_nesterov or adamw, but was {args.opt}")

    scaler = torch.amp.GradScaler(device.type) if args.amp else None

    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=args.lr_warmup_epochs)
    decay = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step_size, args.lr_gamma)
    lr_scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warmup, decay], milestones=[args.lr_warmup_epochs]
    )

    model_without_ddp = model
    if distributed:
        model = nn.parallel.DistributedDataParallel(model)
        model_without_ddp = model.module
    ema = None
    if args.model_ema:
        ema = AveragedModel(model_without_ddp, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    start_epoch = 0
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        start_epoch = checkpoint["epoch"] + 1
    if args.test_only:
        return evaluate(model, criterion, data_loader_test, device, "test")

    print("Start training")
    accuracy = None
    for epoch in range(start_epoch, args.epochs):
        if distributed:
            train_sampler.set_epoch(epoch)
        train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, ema, scaler)
        lr_scheduler.step()
        accuracy = evaluate(model, criterion, data_loader_test, device, "test")
        if ema is not None:
            evaluate(ema, criterion, data_loader_test, device, "test, averaged weights")
        if args.output_dir:
            os.makedirs(args.output_dir, exist_ok=True)
            checkpoint = {
                "model": model_without_ddp.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": lr_scheduler.state_dict(),
                "epoch": epoch,
            }
            torch.save(checkpoint, os.path.join(args.output_dir, "checkpoint.pth"))
    if distributed:
        torch.distributed.destroy_process_group()
    return accuracy


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-path", help="folder of train/ and val/; default: synthetic images")
    parser.add_argument("--model", default="resnet18", help="one of torchvision.models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-b", "--batch-size", default=32, type=int, help="of one process")
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("-j", "--workers", default=0, type=int)
    parser.add_argument("--opt", default="sgd", help="sgd, sgd_nesterov or adamw")
    parser.add_argument("--lr", default=0.1, type=float)
    parser.add_argument("--momentum", default=0.9, type=float)
    parser.add_argument("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
    parser.add_argument("--label-smoothing", default=0.0, type=float)
    parser.add_argument("--lr-warmup-epochs", default=1, type=int)
    parser.add_argument("--lr-step-size", default=30, type=int)
    parser.add_argument("--lr-gamma", default=0.1, type=float)
    parser.add_argument("--print-freq", default=10, type=int)
    parser.add_argument("--output-dir", help="where checkpoints go; default: nowhere")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    parser.add_argument("--test-only", action="store_true")
    parser.add_argument("--sync-bn", action="store_true")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--clip-grad-norm", type=float)
    parser.add_argument("--crop-size", default=64, type=int)
    parser.add_argument("--fake-images", default=128, type=int)
    parser.add_argument("--fake-classes", default=10, type=int)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
