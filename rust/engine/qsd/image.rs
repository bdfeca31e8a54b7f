// SPDX-License-Identifier: GPL-2.0-only

//! Checks of an image file before a daemon opens it.

use super::tool::{command, Files};
use crate::error::{Error, Result};
use crate::options::Options;
use crate::uri::Format;
use rustix::io::Errno;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The greatest length of a message of QEMU's tools that is passed on.
const MAX_MESSAGE: usize = 300;

/// The greatest number of backing files of an image.
const MAX_BACKING_FILES: usize = 256;

/// Exit status of `qemu-img check` if the format has no check.
const NO_CHECK: i32 = 63;

/// The type of a differencing VHD, and where a footer has it.
const VHD_DIFFERENCING: [u8; 4] = [0, 0, 0, 4];
const VHD_TYPE: std::ops::Range<usize> = 60..64;
const VHD_FOOTER: usize = 512;

/// Checks that the image can be served, and repairs it if it is `unclean` or says so itself.
///
/// Returns its backing files.
pub(super) fn prepare(
    format: Format,
    path: &Path,
    options: &Options,
    unclean: bool,
) -> Result<Vec<PathBuf>> {
    if format == Format::Vhd {
        refuse_differencing(path)?;
    }
    if format == Format::Luks {
        return Ok(Vec::new());
    }
    let info = info(format.qemu_name(), path, options)?;
    let backing = backing_files(&info, format, path, options)?;
    let has = |pointer: &str| info.pointer(pointer) == Some(&Value::Bool(true));
    let is_marked = has("/dirty-flag") || has("/format-specific/data/corrupt");
    if !options.read_only && (unclean || is_marked) {
        repair(format, path, options, &backing)?;
    }
    Ok(backing)
}

/// Refuses a differencing VHD, which QEMU would read as if it had no parent.
fn refuse_differencing(path: &Path) -> Result<()> {
    let mut footer = [0; VHD_FOOTER];
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::End(-(VHD_FOOTER as i64)))?;
        file.read_exact(&mut footer)
    });
    read.map_err(|error| Error::from_io(&error, path.display(), "check the image"))?;
    if footer.get(VHD_TYPE) == Some(&VHD_DIFFERENCING) {
        return Err(Error::new(
            Errno::OPNOTSUPP,
            format!("{} is a differencing VHD", path.display()),
            "convert it with its parents to qcow2",
        ));
    }
    Ok(())
}

/// Returns what `qemu-img info` says about one image, without its backing files.
fn info(format: &str, path: &Path, options: &Options) -> Result<Value> {
    let files = Files::of_image(path, true, &[]);
    let mut command = command("qemu-img", options, &files);
    command
        .args(["info", "--force-share", "--output=json", "-f", format])
        .arg(path);
    let output = run(&mut command)?;
    let message = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(qemu_error(&message, path));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|_| qemu_error("qemu-img gives no information", path))
}

/// Returns the backing files of an image, whose own `info` is known, from the nearest on.
fn backing_files(
    info: &Value,
    format: Format,
    path: &Path,
    options: &Options,
) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut next = backing_file(info, format.qemu_name(), path)?;
    while let Some((format, file)) = next {
        if file == path || files.contains(&file) || files.len() >= MAX_BACKING_FILES {
            return Err(Error::new(
                Errno::LOOP,
                format!(
                    "the backing files of {} do not end: {} comes again, or there are more than \
                     {MAX_BACKING_FILES}",
                    path.display(),
                    file.display()
                ),
                "correct one with: qemu-img rebase -u -b FILE -F FORMAT",
            ));
        }
        let info = self::info(&format, &file, options)?;
        next = backing_file(&info, &format, &file)?;
        files.push(file);
    }
    Ok(files)
}

/// Returns the format and the path of the backing file of an image, if it has one.
fn backing_file(info: &Value, format: &str, path: &Path) -> Result<Option<(String, PathBuf)>> {
    let text = |name| info.get(name).and_then(Value::as_str);
    let Some(name) = text("full-backing-filename").or_else(|| text("backing-filename")) else {
        return Ok(None);
    };
    let refused = |cause: String, remedy| Err(Error::new(Errno::INVAL, cause, remedy));
    // A parent of a VMDK is one, too. QEMU would guess others from data that a guest wrote.
    let parent = (format == "vmdk").then_some(format);
    let Some(format) = text("backing-filename-format").or(parent) else {
        return refused(
            format!(
                "{} names no format for its backing file {name}",
                path.display()
            ),
            "add it with: qemu-img rebase -u -b FILE -F FORMAT",
        );
    };
    if !name.starts_with('/') {
        return refused(
            format!(
                "the backing file {name} of {} is not a file",
                path.display()
            ),
            "copy it to a file, and name that with: qemu-img rebase -u -b FILE -F FORMAT",
        );
    }
    Ok(Some((format.to_owned(), PathBuf::from(name))))
}

/// Repairs the image, if its format can be checked.
fn repair(format: Format, path: &Path, options: &Options, backing: &[PathBuf]) -> Result<()> {
    let files = Files::of_image(path, false, backing);
    let mut command = command("qemu-img", options, &files);
    command
        .args(["check", "-q", "-r", "all", "-f", format.qemu_name()])
        .arg(path);
    let output = run(&mut command)?;
    if output.status.success() || output.status.code() == Some(NO_CHECK) {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let error = qemu_error(&message, path);
    if matches!(error.errno(), Errno::INVAL | Errno::IO) {
        return Err(Error::new(
            Errno::IO,
            format!("{} is corrupt: {}", path.display(), error.cause()),
            "restore it from a backup, or repair a copy with qemu-img check -r all",
        ));
    }
    Err(error)
}

fn run(command: &mut Command) -> Result<std::process::Output> {
    command.stdin(Stdio::null()).output().map_err(|error| {
        Error::from_io(&error, "running qemu-img", "install the package qemu-utils")
    })
}

/// Returns the error for a message of one of QEMU's programs.
pub(super) fn qemu_error(message: &str, path: &Path) -> Error {
    let first = message
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no message");
    // The daemon repeats the argument, in JSON, before it says what is wrong with it.
    let first = first.split_once("}: ").map_or(first, |(_, text)| text);
    // What the error says itself.
    let file = format!("Could not open '{}': ", path.display());
    let first = first.split_once(&file).map_or(first, |(_, text)| text);
    let text: String = first
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_MESSAGE)
        .collect();
    let has = |part| message.contains(part);
    if has("lock") && has("Is another process using the image") {
        return Error::new(
            Errno::BUSY,
            format!("{} is in use by another process: {text}", path.display()),
            "detach the image there first",
        );
    }
    let (errno, remedy) = if has("cannot be confined") {
        (
            Errno::OPNOTSUPP,
            "use a kernel with seccomp, mount namespaces and network namespaces",
        )
    } else if has("cannot be run") {
        (Errno::NOENT, "install the package qemu-utils")
    } else if has("No such file or directory") {
        (
            Errno::NOENT,
            "check the paths of the image and its backing files",
        )
    } else if has("Permission denied") {
        (
            Errno::ACCESS,
            "check the permissions of the image and its backing files",
        )
    } else if has("No space left on device") {
        (Errno::NOSPC, "free some space")
    } else {
        (
            Errno::INVAL,
            "check the format of the image, and the image with qemu-img check",
        )
    };
    Error::new(
        errno,
        format!("{} cannot be opened: {text}", path.display()),
        remedy,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_have_an_errno() {
        let path = Path::new("/image");
        for (message, errno) in [
            (
                "qemu-img: Could not open 'a': Failed to get \"write\" lock\n\
                 Is another process using the image [a]?",
                Errno::BUSY,
            ),
            (
                "x: Could not open 'b': No such file or directory",
                Errno::NOENT,
            ),
            ("x: Could not open 'b': Permission denied", Errno::ACCESS),
            ("Image is not in qcow2 format", Errno::INVAL),
            (
                "rblktap: qemu-img cannot be run: No such file",
                Errno::NOENT,
            ),
            (
                "rblktap: the process cannot be confined: unshare: no",
                Errno::OPNOTSUPP,
            ),
            ("", Errno::INVAL),
        ] {
            assert_eq!(qemu_error(message, path).errno(), errno);
        }
        let message = "qemu-storage-daemon: --blockdev {\"driver\":\"luks\"}: No key";
        let error = qemu_error(message, path);
        assert_eq!(error.cause(), "/image cannot be opened: No key");
        let message = "qemu-img: Could not open '/image': Image is not in qcow2 format";
        let error = qemu_error(message, path);
        assert_eq!(
            error.cause(),
            "/image cannot be opened: Image is not in qcow2 format"
        );
        let long = "a\u{1b}".repeat(1000);
        assert!(qemu_error(&long, path).cause().len() < 400);
    }

    #[test]
    fn backing_files_need_a_format_and_a_path() {
        let path = Path::new("/image");
        let backing = |info: Value, format| backing_file(&info, format, path);
        assert!(backing(json!({}), "qcow2").unwrap().is_none());
        let mut info = json!({ "backing-filename": "b", "full-backing-filename": "/b" });
        assert!(backing(info.clone(), "qcow2").is_err());
        let vmdk = backing(info.clone(), "vmdk").unwrap();
        assert_eq!(vmdk, Some(("vmdk".into(), "/b".into())));
        info["backing-filename-format"] = "raw".into();
        let found = backing(info.clone(), "qcow2").unwrap();
        assert_eq!(found, Some(("raw".into(), "/b".into())));
        info["full-backing-filename"] = "nbd://host/export".into();
        assert!(backing(info, "qcow2").is_err());
    }
}
