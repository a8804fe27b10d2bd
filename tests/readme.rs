//! The examples of the README are compiled, and run where the library has been built (`make`), and print what the
//! README says they print.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The code blocks of the README in one language.
fn blocks(language: &str) -> Vec<String> {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let opening = format!("{language}\n");
    let fenced = readme.split("```").skip(1).step_by(2);
    fenced.filter_map(|block| block.strip_prefix(&opening)).map(str::to_string).collect()
}

/// What the README shows below the command that ends in `command`.
fn shown_output(command: &str) -> String {
    let consoles = blocks("console");
    let shown = consoles.iter().find_map(|block| block.split_once(&format!("{command}\n")));
    shown.unwrap_or_else(|| panic!("no output of {command} in the README")).1.to_string()
}

fn have(program: &str) -> bool {
    let have = Command::new(program).arg("--version").output().is_ok();
    if !have {
        assert!(std::env::var_os("CI").is_none(), "{program} is needed in CI");
        eprintln!("SKIPPED: {program} is not installed");
    }
    have
}

/// The built library, if `make` has been run. `make check` builds it first.
fn library() -> Option<PathBuf> {
    let folder = root().join("build");
    if folder.join("libqcow2.so").exists() {
        return Some(folder);
    }
    assert!(std::env::var_os("CI").is_none(), "the library must be built first (make)");
    eprintln!("SKIPPED: the library is not built (make)");
    None
}

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("libqcow2-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn output(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {text}");
    text
}

#[test]
fn the_c_example_compiles_and_prints_what_is_shown() {
    if !have("cc") {
        return;
    }
    let dir = Dir::new("readme-c");
    let examples = blocks("c");
    assert_eq!(examples.len(), 1, "the README has one C example");
    std::fs::write(dir.0.join("app.c"), &examples[0]).unwrap();
    let strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];
    let include = format!("-I{}", root().join("include").display());
    let cc = || {
        let mut cc = Command::new("cc");
        cc.current_dir(&dir.0).args(strict).arg(&include).arg("app.c");
        cc
    };
    output(cc().args(["-c", "-o", "app.o"]));
    let Some(library) = library() else { return };
    let found_at_run_time = format!("-Wl,-rpath,{}", library.display());
    output(cc().arg("-L").arg(&library).args(["-lqcow2", &found_at_run_time]));
    assert_eq!(output(Command::new("./a.out").current_dir(&dir.0)), shown_output("./a.out"));
}

#[test]
fn the_python_example_prints_what_is_shown() {
    let examples = blocks("python");
    assert_eq!(examples.len(), 1, "the README has one Python example");
    if !have("python3") {
        return;
    }
    let Some(library) = library() else { return };
    let dir = Dir::new("readme-python");
    std::fs::write(dir.0.join("app.py"), &examples[0]).unwrap();
    let mut python = Command::new("python3");
    python.env("PYTHONPATH", root().join("python")).env("LIBQCOW2_SO", library.join("libqcow2.so"));
    assert_eq!(output(python.arg("app.py").current_dir(&dir.0)), shown_output("python3 app.py"));
}
