using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// A folder that is there whole or not at all: made under a temporary name beside the final one and
/// renamed when everything is in it. What fails before leaves nothing.
/// </summary>
internal sealed class NewFolder : IDisposable
{
    private readonly string _final;
    private bool _isPlaced;

    private NewFolder(string final) =>
        (_final, Path) = (final, $"{final}.{Environment.ProcessId}{RunFolder.Unfinished}");

    /// <summary>Where to write.</summary>
    public string Path { get; }

    /// <param name="path">The folder to make; an empty one may be there.</param>
    /// <param name="bytes">What will be written into it, about.</param>
    /// <exception cref="InputException">There is something already.</exception>
    /// <exception cref="RunException">It cannot be made, or does not fit on the disk.</exception>
    public static NewFolder Create(string path, long bytes)
    {
        string final =
            System.IO.Path.TrimEndingDirectorySeparator(System.IO.Path.GetFullPath(path));
        if (File.Exists(final))
            throw new InputException($"--out {path} is a file, expected a new folder");
        if (Directory.Exists(final) && Directory.EnumerateFileSystemEntries(final).Any())
            throw new InputException($"--out {path} is not empty: choose a new folder");
        var folder = new NewFolder(final);
        try
        {
            Directory.CreateDirectory(folder.Path);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw Failed(path, failure);
        }

        if (RunPlaces.Free(folder.Path) is { } free && free < bytes)
        {
            folder.Dispose();
            throw new RunException($"--out {path}: {RunPlaces.Gib(bytes)} are needed, "
                + $"{RunPlaces.Gib(free)} are free on its disk");
        }

        return folder;
    }

    /// <summary>Gives it its name.</summary>
    /// <exception cref="RunException">It cannot be renamed.</exception>
    public void Place()
    {
        try
        {
            if (Directory.Exists(_final)) Directory.Delete(_final);
            Directory.Move(Path, _final);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw Failed(_final, failure);
        }

        _isPlaced = true;
    }

    public void Dispose()
    {
        if (!_isPlaced) RunFolder.RemoveUnfinished(Path);
    }

    private static RunException Failed(string path, Exception failure) =>
        new($"--out {path}: cannot write: {Messages.OneLine(failure.Message)}", failure);
}
