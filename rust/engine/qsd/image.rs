// SPDX-License-Identifier: GPL-2.0-only

//! Checks of an image file before a daemon opens it.

use crate::error::{Error, Result};
use crate::uri::Format;
use rustix::io::Errno;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Command, Stdio};

/// The greatest length of a message of QEMU's tools that is passed on.
const MAX_MESSAGE: usize = 300;

/// Exit status of `qemu-img check` if the format has no check.
const NO_CHECK: i32 = 63;

/// The type of a differencing VHD, and where a footer has it.
const VHD_DIFFERENCING: [u8; 4] = [0, 0, 0, 4];
const VHD_TYPE: std::ops::Range<usize> = 60..64;
const VHD_FOOTER: usize = 512;

/// Checks that the image can be served, and repairs it if it is `unclean` or says so itself.
pub(super) fn prepare(format: Format, path: &Path, read_only: bool, unclean: bool) -> Result<()> {
    if format == Format::Vhd {
        refuse_differencing(path)?;
    }
    if format == Format::Luks {
        return Ok(());
    }
    let info = info(format, path)?;
    check_backing(&info, path)?;
    let has = |pointer: &str| info.pointer(pointer) == Some(&Value::Bool(true));
    let is_marked = has("/dirty-flag") || has("/format-specific/data/corrupt");
    if !read_only && (unclean || is_marked) {
        repair(format, path)?;
    }
    Ok(())
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

/// Returns what `qemu-img info` says about the image and its backing files.
fn info(format: Format, path: &Path) -> Result<Value> {
    let args = [
        "info",
        "--force-share",
        "--output=json",
        "--backing-chain",
        "-f",
    ];
    let mut command = Command::new("qemu-img");
    command.args(args).arg(format.qemu_name()).arg(path);
    let output = run(&mut command)?;
    let message = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(qemu_error(&message, path));
    }
    match serde_json::from_slice(&output.stdout) {
        Ok(Value::Array(chain)) if !chain.is_empty() => Ok(merge(chain)),
        _ => Err(qemu_error("qemu-img gives no information", path)),
    }
}

/// Returns the information on the image, with those on its backing files as `chain`.
fn merge(mut chain: Vec<Value>) -> Value {
    let mut image = chain.remove(0);
    if let Some(image) = image.as_object_mut() {
        image.insert("chain".to_owned(), Value::Array(chain));
    }
    image
}

/// Refuses a backing file without a format: QEMU would guess one from data that a guest wrote.
fn check_backing(info: &Value, path: &Path) -> Result<()> {
    let chain = info.get("chain").and_then(Value::as_array);
    for image in std::iter::once(info).chain(chain.into_iter().flatten()) {
        let Some(backing) = image.get("backing-filename").and_then(Value::as_str) else {
            continue;
        };
        let is_qcow2 = image.get("format").and_then(Value::as_str) == Some("qcow2");
        if is_qcow2 && image.get("backing-filename-format").is_none() {
            return Err(Error::new(
                Errno::INVAL,
                format!(
                    "{} names no format for its backing file {backing}",
                    path.display()
                ),
                "add it with: qemu-img rebase -u -b FILE -F FORMAT",
            ));
        }
    }
    Ok(())
}

/// Repairs the image, if its format can be checked.
fn repair(format: Format, path: &Path) -> Result<()> {
    let mut command = Command::new("qemu-img");
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
    let text: String = first
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_MESSAGE)
        .collect();
    let has = |part| message.contains(part);
    let (errno, remedy) = if has("lock") && has("Is another process using the image") {
        (Errno::BUSY, "detach the image there first")
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
            ("", Errno::INVAL),
        ] {
            assert_eq!(qemu_error(message, path).errno(), errno);
        }
        let message = "qemu-storage-daemon: --blockdev {\"driver\":\"luks\"}: No key";
        let error = qemu_error(message, path);
        assert_eq!(error.cause(), "/image cannot be opened: No key");
        let long = "a\u{1b}".repeat(1000);
        assert!(qemu_error(&long, path).cause().len() < 400);
    }

    #[test]
    fn backing_files_need_a_format() {
        let path = Path::new("/image");
        let backed = |format: Value| {
            let mut info = json!({ "format": "qcow2", "backing-filename": "b" });
            if !format.is_null() {
                info["backing-filename-format"] = format;
            }
            info
        };
        let plain = json!({ "format": "qcow2" });
        assert!(check_backing(&plain, path).is_ok());
        assert!(check_backing(&merge(vec![backed(json!("raw")), plain.clone()]), path).is_ok());
        assert!(check_backing(&backed(Value::Null), path).is_err());
        let chain = merge(vec![backed(json!("qcow2")), backed(Value::Null)]);
        assert!(check_backing(&chain, path).is_err());
        let vmdk = json!({ "format": "vmdk", "backing-filename": "b" });
        assert!(check_backing(&vmdk, path).is_ok());
    }
}
