// SPDX-License-Identifier: GPL-2.0-only

//! Messages of programs that serve disks.

use std::fmt;
use std::io::{self, Write};

/// Writes a line to the standard error, as `eprintln!` does, and ignores errors.
///
/// `eprintln!` ends the process if its file system is full, or if its terminal is gone.
#[macro_export]
macro_rules! message {
    ($($text:tt)*) => {
        $crate::message::write(format_args!($($text)*))
    };
}

/// Writes a line for [`message!`](crate::message!).
pub fn write(text: fmt::Arguments<'_>) {
    write_to(io::stderr(), text);
}

fn write_to(mut output: impl Write, text: fmt::Arguments<'_>) {
    // One write, so that lines of several processes do not mix. There is no one to report an error
    // to.
    let _ = output.write_all(format!("{text}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_message_is_a_line_and_an_error_is_ignored() {
        let mut output = Vec::new();
        write_to(&mut output, format_args!("5-51712: {}", "no"));
        assert_eq!(output, b"5-51712: no\n");
        write_to(
            File::options().write(true).open("/dev/full").unwrap(),
            format_args!("x"),
        );
    }
}
