//! External data files: finding the one that an image refers to, and making the one of a new image. A reference is
//! denied unless the caller allows it, as with backing files: a name in an image is input of whoever made it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::backing::{Folder, open_file};
use super::options::{CreateOptions, OpenOptions};
use crate::error::{Error, Result};
use crate::format::header::{AUTOCLEAR_DATA_FILE_RAW, INCOMPATIBLE_DATA_FILE};
use crate::format::{Extension, Header, extension};
use crate::storage::Storage;

/// An external data file that has been found.
pub(super) struct DataSource {
    /// What it is called in errors.
    pub(super) name: String,
    pub(super) storage: Arc<dyn Storage>,
    /// It was opened here, and is not the caller's.
    pub(super) opened_here: bool,
    /// It is a raw image of the disk by itself.
    pub(super) is_raw: bool,
}

/// Finds the external data file of the image at `depth`, if it has one: given by the caller, named by the caller, found
/// by the caller's resolver, or opened by the name in the image where the caller allows that.
pub(super) fn find(
    header: &Header,
    depth: u32,
    folder: Option<&Folder>,
    options: &OpenOptions,
) -> Result<Option<DataSource>> {
    let given = options.data_file_storages.get(depth as usize).cloned().flatten();
    let named = options.data_file.as_deref().filter(|_| depth == 0);
    if !header.has_data_file() {
        return match (given, named) {
            (None, None) => Ok(None),
            (_, named) => Err(Error::OptionValue {
                key: "data_file".into(),
                value: named.unwrap_or("(a storage)").into(),
                expected: "to be left out: the image has no external data file".into(),
            }),
        };
    }
    let writable = depth == 0 && !options.read_only;
    let stored = header.data_file_name();
    let found = |name, storage, opened_here| {
        Ok(Some(DataSource { name, storage, opened_here, is_raw: header.data_file_is_raw() }))
    };
    if let Some(storage) = given {
        return found(stored.unwrap_or_default(), storage, false);
    }
    if let Some(name) = named {
        let storage = open_file(Path::new(name), writable).map_err(|e| failed(name, e))?;
        return found(name.to_owned(), Arc::new(storage), true);
    }
    let Some(name) = stored else { return Err(Error::DataFileMissing) };
    let storage = match (&options.resolver, folder) {
        (Some(resolver), _) => resolver.resolve_data_file(&name, writable, depth),
        (None, Some(folder)) => folder.open_data_file(&name, options.backing, writable),
        (None, None) => Folder::nowhere().open_data_file(&name, options.backing, writable),
    };
    let storage = storage.map_err(|e| failed(&name, e))?;
    found(name, storage, options.resolver.is_none())
}

fn failed(name: &str, error: Error) -> Error {
    match error {
        Error::DataFileDenied { .. } | Error::DataFile { .. } => error,
        e => Error::DataFile { name: name.to_owned(), source: Box::new(e) },
    }
}

/// Where the external data file of a new image goes: a relative name starts from the folder of the image, because that
/// is where it is looked for when the image is opened.
pub(super) fn path_for_new(image: &Path, options: &CreateOptions) -> Option<PathBuf> {
    let name = Path::new(options.data_file.as_deref()?);
    Some(image.parent().map_or_else(|| name.to_path_buf(), |folder| folder.join(name)))
}

/// Checks what is said of the external data file of a new image, which has one or not.
pub(super) fn check_new(options: &CreateOptions, has_one: bool) -> Result<()> {
    let wrong = |key: &str, value: &str, expected: &str| {
        Err(Error::OptionValue { key: key.into(), value: value.into(), expected: expected.into() })
    };
    match (&options.data_file, options.data_file_raw) {
        (Some(name), _) if !has_one => wrong("data_file", name, "to come with a storage for the external data file"),
        (None, true) if !has_one => wrong("data_file_raw", "on", "off, as data_file is not set"),
        _ => Ok(()),
    }
}

/// Says in the header of a new image that it has an external data file.
pub(super) fn describe(header: &mut Header, options: &CreateOptions) {
    header.incompatible |= INCOMPATIBLE_DATA_FILE;
    header.autoclear |= if options.data_file_raw { AUTOCLEAR_DATA_FILE_RAW } else { 0 };
    let name = options.data_file.iter();
    let stored = name.map(|name| Extension { kind: extension::DATA_FILE, data: name.clone().into_bytes() });
    header.extensions.splice(0..0, stored);
}
