using MiniCpmNative.Engine.Data.Text;

namespace MiniCpmNative.Engine.Data;

/// <summary>How a row names its pictures.</summary>
public enum PictureNames
{
    /// <summary>No "image": a text-only row.</summary>
    None,

    /// <summary>
    /// "image": "a.png", shown at &lt;image&gt; or in front of the first question.
    /// </summary>
    Single,

    /// <summary>"image": {"&lt;image_00&gt;": "a.png", ...}, shown at their tags.</summary>
    Tagged,

    /// <summary>
    /// "image": ["a.png", ...], shown at the &lt;image&gt; tags in order, or all in front.
    /// </summary>
    Listed,
}

/// <summary>One picture of a row, or a sound; the path as the row has it.</summary>
public sealed record RowPicture(string Tag, string Path)
{
    /// <summary>What it is, in messages.</summary>
    public string Kind => KindOf(Tag);

    internal static string KindOf(string tag) => tag == SoundText.Tag ? "sound" : "picture";

    /// <summary>The file's content where the row holds it; Path is a name of it then.</summary>
    public byte[]? Bytes { get; init; }

    /// <summary>
    /// Of the first frame of a group of a video's frames, which the model joins: the temporal id of
    /// it and of each that follows; null for all other pictures.
    /// </summary>
    public IReadOnlyList<int>? Times { get; init; }

    /// <summary>Frames that are one picture with it, behind it (<see cref="FrameMosaic"/>).
    /// </summary>
    public IReadOnlyList<RowPicture> Beside { get; init; } = [];

    /// <summary>It and those beside it: each is a file, or content of its own.</summary>
    public IEnumerable<RowPicture> Each => Beside.Prepend(this);

    /// <summary>What tells it from others.</summary>
    public string Name => Beside.Count == 0 ? Path
        : string.Join(" + ", Each.Select(one => one.Path));
}

/// <summary>
/// One row of a data file. Number counts from 1: the row, or the line of a .jsonl file.
/// </summary>
public sealed record Row(
    string File, int Number, string? Id, PictureNames Names, IReadOnlyList<RowPicture> Pictures,
    IReadOnlyList<ChatTurn> Turns)
{
    /// <summary>Number, counted on over all files of a data set.</summary>
    public int Place { get; init; } = Number;

    /// <summary>Its videos; mostly none.</summary>
    public IReadOnlyList<RowVideo> Videos { get; init; } = [];

    /// <summary>Why its videos cannot be used, if they cannot.</summary>
    public string? Fault { get; init; }

    /// <summary>Pictures that are no frames of a video; they stand in front of those.</summary>
    public int Stills => Pictures.Count - Videos.Sum(video => video.Count);

    /// <summary>The video whose frames begin with that picture, if one's do.</summary>
    public RowVideo? VideoAt(int picture) => picture < Stills ? null
        : Videos.FirstOrDefault(video => video.First == picture);

    /// <summary>Boxes that are still to be written into the turns; mostly none.</summary>
    public Grounding? Objects { get; init; }

    /// <summary>Its sounds, in the order of their tags; mostly none.</summary>
    public IReadOnlyList<RowPicture> Sounds { get; init; } = [];

    /// <summary>Right answers to the last question, besides the row's own; mostly none.</summary>
    public IReadOnlyList<string> References { get; init; } = [];

    /// <summary>
    /// The turn (from 0) that is asked for when the row is answered: its last one where that is an
    /// answer, else one behind it.
    /// </summary>
    public int Answer => Turns[^1].Role == "assistant" ? Turns.Count - 1 : Turns.Count;

    /// <summary>
    /// What that turn says, calls of functions as the model writes them; null where the row leaves
    /// it open.
    /// </summary>
    public string? Expected
    {
        get => field ?? (Answer < Turns.Count ? Turns[Answer].Content : null);
        init;
    }

    /// <summary>
    /// What makes the row unusable, as an exception to throw; turn counts from 1.
    /// </summary>
    public BadRowException Bad(string reason, int? turn = null) =>
        new(new BadRow(File, Number, Id, turn, reason) { Place = Place });

    /// <summary>
    /// The file of a picture path: relative to the data file's folder,
    /// else to the working directory.
    /// </summary>
    /// <exception cref="BadRowException">Neither exists.</exception>
    public string Locate(RowPicture picture) =>
        Locate(picture.Kind, picture.Path, System.IO.File.Exists);

    /// <summary>The same of anything.</summary>
    /// <param name="what">It, in messages.</param>
    /// <param name="path">As the row has it.</param>
    /// <param name="exists">Whether it is at a path.</param>
    /// <exception cref="BadRowException">It is nowhere.</exception>
    public string Locate(string what, string path, Func<string, bool> exists)
    {
        return Find(path)
            // Separators of Windows, where no file has them in its name.
            ?? (path.Contains('\\') ? Find(path.Replace('\\', '/')) : null)
            ?? throw Bad($"{what} {Messages.Quote(path)} is neither in the data file's "
                + "folder nor in the working directory");

        string? Find(string path)
        {
            string beside = System.IO.Path.Combine(
                System.IO.Path.GetDirectoryName(System.IO.Path.GetFullPath(File)) ?? "", path);
            return exists(beside) ? beside : exists(path) ? path : null;
        }
    }
}

/// <summary>A row that cannot be trained on, and why.</summary>
public sealed record BadRow(string File, int Number, string? Id, int? Turn, string Reason)
{
    /// <summary>Number, counted on over all files of a data set.</summary>
    public int Place { get; init; } = Number;

    /// <summary>train.json row 17 (id "42"), turn 3: reason</summary>
    public override string ToString() => $"{File} row {Number}"
        + (Id is null ? "" : $" (id {Messages.Quote(Id)})")
        + (Turn is null ? "" : $", turn {Turn}") + $": {Reason}";
}

/// <summary>Thrown where one row is at fault, so that the caller may refuse or skip it.</summary>
public sealed class BadRowException(BadRow row) : Exception(row.ToString())
{
    public BadRow Row { get; } = row;
}

/// <summary>
/// The rows of a data file: those that can be used, and the others with their reasons.
/// </summary>
/// <param name="Format">What the file was taken for; null for the official format.</param>
public sealed record RowSet(
    IReadOnlyList<Row> Rows, IReadOnlyList<BadRow> Bad, string? Format = null);

/// <summary>How rows are read.</summary>
/// <param name="Asked">They are only asked, and need no answers.</param>
/// <param name="LastOnly">Of each row only answers behind the last question are learned.</param>
internal readonly record struct RowOptions(bool Asked = false, bool LastOnly = false);
