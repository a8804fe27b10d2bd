//! QEMU's tools as a second opinion. Where they are missing, tests that need them say so loudly, and fail under CI.
#![allow(dead_code)] // each test file uses its own part

use std::path::PathBuf;
use std::process::Command;

/// A scratch directory that goes away with the value.
pub struct Dir(PathBuf);

impl Dir {
    /// A scratch directory (in memory where the system has such a place).
    pub fn new(name: &str) -> Self {
        let shm = PathBuf::from("/dev/shm");
        Self::under(if shm.is_dir() { shm } else { std::env::temp_dir() }, name)
    }

    /// A scratch directory in a folder.
    fn under(root: PathBuf, name: &str) -> Self {
        let dir = root.join(format!("libqcow2-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    /// A path inside.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A scratch directory if qemu-img and qemu-io are there.
pub fn dir(name: &str) -> Option<Dir> {
    are_there(name).then(|| Dir::new(name))
}

/// As [`dir`], where files have a disk behind them (or what the system calls temporary).
pub fn dir_on_disk(name: &str) -> Option<Dir> {
    are_there(name).then(|| Dir::under(std::env::temp_dir(), name))
}

fn are_there(name: &str) -> bool {
    let there = |tool: &str| Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
    if there("qemu-img") && there("qemu-io") {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "qemu-img and qemu-io are needed under CI");
    eprintln!("SKIPPED: {name} needs qemu-img and qemu-io");
    false
}

/// A tool that runs in the folder of the first file that it is told of: QEMU looks for external data files from where
/// it runs, not from where the image is.
fn tool(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(name);
    let folder = args.iter().find(|arg| arg.starts_with('/')).and_then(|path| std::path::Path::new(path).parent());
    if let Some(folder) = folder.filter(|folder| folder.is_dir()) {
        command.current_dir(folder);
    }
    command.args(args);
    command
}

/// Runs qemu-img; returns what it printed.
#[track_caller]
pub fn img(args: &[&str]) -> String {
    let out = tool("qemu-img", args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "qemu-img {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// Runs qemu-io commands on a qcow2 image in one process.
#[track_caller]
pub fn io(path: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", "qcow2"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(path);
    let out = tool("qemu-io", &args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let failed = !out.status.success() || text.contains("failed") || text.contains("rror");
    assert!(!failed, "qemu-io {commands:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// `qemu-img check`: errors and leaks are both wrong unless `leaks_allowed`.
#[track_caller]
pub fn check(path: &str, leaks_allowed: bool) {
    let out = tool("qemu-img", &["check", "-f", "qcow2", path]).output().unwrap();
    let code = out.status.code();
    let ok = code == Some(0) || leaks_allowed && code == Some(3);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(ok, "qemu-img check {path} ends with {code:?}: {}", &text[..text.len().min(3000)]);
}

/// What `qemu-img check` counts as errors and as leaks, or what it says where it cannot. Not counted is what it says of
/// COPIED flags: it compares them with the count, which a crash may leave too high. What is dangerous is COPIED with more
/// than one reference, and that is for the judge.
pub fn errors_and_leaks(path: &str) -> Result<(u64, u64), String> {
    let out = tool("qemu-img", &["check", "-f", "qcow2", "--output=json", path]).output().unwrap();
    let (text, said) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    let number = |name: &str| {
        let after = text.split(&format!("\"{name}\":")).nth(1)?;
        after.trim_start().split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    match (out.status.code(), number("check-errors")) {
        (Some(0 | 2 | 3), Some(0)) => {
            let flags = said.lines().filter(|line| line.contains("OFLAG_COPIED")).count() as u64;
            Ok((number("corruptions").unwrap_or(0u64).saturating_sub(flags), number("leaks").unwrap_or(0)))
        }
        (code, _) => Err(format!("{code:?}: {text}{said}")),
    }
}
