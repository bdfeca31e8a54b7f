// SPDX-License-Identifier: GPL-2.0-only

//! `rblk image`: images by `qemu-img`.
//!
//! The format is always the one that the URI names; `qemu-img` never guesses it from the contents,
//! which the guest wrote.

use crate::args::{ImageCommand, SnapshotCommand};
use crate::exit::{io_failure, Error};
use api::{Failure, FailureKind};
use engine::vhd::VhdChain;
use engine::{Format, Options, Uri};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::process::Command;

/// Exit statuses of `qemu-img check`, with their meanings.
const CHECK_RESULTS: [(i32, &str, &str); 3] = [
    (2, "the image is corrupt", "save a copy, then use --repair"),
    (
        3,
        "the image has leaked clusters",
        "use --repair to free them",
    ),
    (
        63,
        "the format has no check",
        "only qcow2, vhdx and vmdk have one",
    ),
];

/// Runs a command.
pub fn run(command: &ImageCommand, json: bool) -> Result<(), Error> {
    match command {
        ImageCommand::Create {
            image,
            size,
            backing,
        } => create(image, size.as_deref(), backing.as_ref()),
        ImageCommand::Info { image } => {
            let output = if json {
                "--output=json"
            } else {
                "--output=human"
            };
            qemu_img(&[
                "info",
                "--force-share",
                output,
                "-f",
                format(image),
                &file(image)?,
            ])
        }
        ImageCommand::Snapshot { command } => snapshot(command),
        ImageCommand::Commit { image } => {
            qemu_img(&["commit", "-q", "-f", format(image), &file(image)?])
        }
        ImageCommand::Check { image, repair } => check(image, *repair, json),
        ImageCommand::Convert { source, target } => convert(source, target),
    }
}

fn create(image: &Uri, size: Option<&str>, backing: Option<&Uri>) -> Result<(), Error> {
    let file = file(image)?;
    let mut args = vec!["create", "-q", "-f", format(image)];
    let backing_file = backing.map(self::file).transpose()?;
    if let (Some(backing), Some(file)) = (backing, &backing_file) {
        args.extend(["-F", format(backing), "-b", file]);
    }
    args.push(&file);
    args.extend(size);
    into_new_file(image, &args)
}

fn convert(source: &Uri, target: &Uri) -> Result<(), Error> {
    if let Uri::Image {
        format: Format::Vhd,
        path,
    } = source
    {
        let chain = VhdChain::open(path).map_err(|error| engine_failure(&error))?;
        if chain.is_differencing() {
            return convert_chain(&chain, target);
        }
    }
    let (from, to) = (file(source)?, file(target)?);
    let args = [
        "convert",
        "-f",
        format(source),
        "-O",
        format(target),
        &from,
        &to,
    ];
    into_new_file(target, &args)
}

/// Converts a VHD with its parents, which `qemu-img` would leave out.
fn convert_chain(chain: &VhdChain, target: &Uri) -> Result<(), Error> {
    create(target, Some(&chain.size().to_string()), None)?;
    let copied = engine::open(target, &Options::default()).and_then(|engine| {
        chain.copy_to(&*engine)?;
        engine.close()
    });
    if let (Err(_), Uri::Image { path, .. }) = (&copied, target) {
        // The reason is in `copied`; a file that stays is a nuisance only.
        let _ = fs::remove_file(path);
    }
    Ok(copied.map_err(|error| engine_failure(&error))?)
}

fn engine_failure(error: &engine::Error) -> Failure {
    Failure::new(
        FailureKind::Failed,
        error.cause().to_owned(),
        error.remedy().to_owned(),
    )
}

/// Runs `qemu-img`, which writes to the file of `image`, and removes the file again if it fails.
fn into_new_file(image: &Uri, args: &[&str]) -> Result<(), Error> {
    let Uri::Image { path, .. } = image else {
        return qemu_img(args);
    };
    reserve(path)?;
    let result = qemu_img(args);
    if result.is_err() {
        // The reason is in `result`; an empty file that stays is a nuisance only.
        let _ = fs::remove_file(path);
    }
    result
}

/// Creates an empty file, so that an existing one is never overwritten.
fn reserve(path: &Path) -> Result<(), Failure> {
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::new(
            FailureKind::Refused,
            format!("{} exists", path.display()),
            "remove it, or choose another name",
        )),
        Err(error) => Err(io_failure(path.display(), &error)),
    }
}

fn snapshot(command: &SnapshotCommand) -> Result<(), Error> {
    match command {
        SnapshotCommand::List { image } => qemu_img(&[
            "snapshot",
            "--force-share",
            "-l",
            "-f",
            format(image),
            &file(image)?,
        ]),
        SnapshotCommand::Create { image, name } => change_snapshot("-c", image, name),
        SnapshotCommand::Apply { image, name } => change_snapshot("-a", image, name),
        SnapshotCommand::Delete { image, name } => change_snapshot("-d", image, name),
    }
}

fn change_snapshot(option: &str, image: &Uri, name: &str) -> Result<(), Error> {
    qemu_img(&[
        "snapshot",
        "-q",
        "-f",
        format(image),
        option,
        name,
        &file(image)?,
    ])
}

fn check(image: &Uri, repair: bool, json: bool) -> Result<(), Error> {
    let mut args = vec!["check", "-f", format(image)];
    args.push(if json {
        "--output=json"
    } else {
        "--output=human"
    });
    if repair {
        args.extend(["-r", "all"]);
    }
    let file = file(image)?;
    args.push(&file);
    let status = start(&args)?.code();
    if status == Some(0) {
        return Ok(());
    }
    let result = CHECK_RESULTS
        .iter()
        .find(|(code, ..)| status == Some(*code));
    let (_, cause, remedy) =
        result
            .copied()
            .unwrap_or((1, "the check failed", "see the message above"));
    Err(Failure::new(FailureKind::Failed, format!("{image}: {cause}"), remedy).into())
}

/// Returns `qemu-img`'s name of the format.
fn format(image: &Uri) -> &'static str {
    match image {
        Uri::Image { format, .. } => format.qemu_name(),
        Uri::Nbd(_) | Uri::Rbd(_) | Uri::Gluster(_) | Uri::Memory { .. } => Format::Raw.qemu_name(),
    }
}

/// Returns `qemu-img`'s name of the file. An absolute path is never taken for a protocol.
fn file(image: &Uri) -> Result<String, Failure> {
    match image {
        Uri::Image { path, .. } => Ok(path.to_string_lossy().into_owned()),
        Uri::Nbd(export) => Ok(export.to_string()),
        Uri::Rbd(_) | Uri::Gluster(_) => Err(Failure::new(
            FailureKind::Refused,
            format!("{image} is on cluster storage"),
            "see rblk volume, or use the tools of Ceph or GlusterFS",
        )),
        Uri::Memory { .. } => Err(Failure::new(
            FailureKind::Refused,
            format!("{image} is memory of another process"),
            "name a file or an NBD export",
        )),
    }
}

fn qemu_img(args: &[&str]) -> Result<(), Error> {
    if start(args)?.success() {
        return Ok(());
    }
    let what = args.first().copied().unwrap_or_default();
    let cause = format!("qemu-img {what} failed");
    Err(Failure::new(FailureKind::Failed, cause, "see its message above").into())
}

fn start(args: &[&str]) -> Result<std::process::ExitStatus, Failure> {
    Command::new("qemu-img")
        .args(args)
        .status()
        .map_err(|error| {
            Failure::new(
                FailureKind::Failed,
                format!("qemu-img does not start: {error}"),
                "install qemu-utils",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(scheme: &str, path: &Path) -> Uri {
        format!("{scheme}:{}", path.display()).parse().unwrap()
    }

    fn kind(result: Result<(), Error>) -> FailureKind {
        match result.unwrap_err() {
            Error::Failure(failure) => failure.kind,
            error => panic!("{error:?}"),
        }
    }

    #[test]
    fn images_are_created_once_checked_and_converted() {
        let dir = tempfile::tempdir().unwrap();
        let base = uri("qcow2", &dir.path().join("base"));
        let size = Some("1M".to_owned());
        let create = |image: &Uri, size: &Option<String>, backing: Option<&Uri>| {
            let [image, backing] = [Some(image), backing].map(Option::<&Uri>::cloned);
            let (image, size) = (image.unwrap(), size.clone());
            run(
                &ImageCommand::Create {
                    image,
                    size,
                    backing,
                },
                false,
            )
        };
        create(&base, &size, None).unwrap();
        assert_eq!(kind(create(&base, &size, None)), FailureKind::Refused);
        let overlay = uri("qcow2", &dir.path().join("overlay"));
        create(&overlay, &None, Some(&base)).unwrap();
        let image = overlay.clone();
        run(
            &ImageCommand::Check {
                image,
                repair: false,
            },
            true,
        )
        .unwrap();
        let [source, target] = [overlay, uri("raw", &dir.path().join("raw"))];
        run(&ImageCommand::Convert { source, target }, false).unwrap();
        assert_eq!(fs::metadata(dir.path().join("raw")).unwrap().len(), 1 << 20);
    }

    #[test]
    fn a_failure_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let image = uri("qcow2", &dir.path().join("a"));
        let backing = Some(uri("raw", &dir.path().join("missing")));
        let size = None;
        assert_eq!(
            kind(run(
                &ImageCommand::Create {
                    image,
                    size,
                    backing
                },
                false
            )),
            FailureKind::Failed
        );
        assert!(!dir.path().join("a").exists());
    }

    #[test]
    fn corruption_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "not qcow2").unwrap();
        let image = uri("qcow2", &path);
        assert_eq!(
            kind(run(
                &ImageCommand::Check {
                    image,
                    repair: false
                },
                false
            )),
            FailureKind::Failed
        );
    }
}
