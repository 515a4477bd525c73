using System.Globalization;
using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using MiniCpmNative.Engine.Data.Images;

namespace MiniCpmNative.Engine.Data;

/// <summary>
/// Frames of video files, decoded by ffmpeg where it is installed. The frames that are chosen are
/// written as PNG files into a folder of their own and stay there: a run that goes on, or reads the
/// rows again, finds them.
/// </summary>
/// <param name="cache">Where those folders lie.</param>
/// <param name="ffmpeg">The program that decodes.</param>
/// <param name="ffprobe">The one that counts frames.</param>
public sealed class VideoDecoder(
    string cache, string ffmpeg = "ffmpeg", string ffprobe = "ffprobe")
{
    // An argument of a command has an end.
    private const int MostAtOnce = 1000;

    /// <summary>
    /// $XDG_CACHE_HOME/cpmx/frames or ~/.cache/cpmx/frames (LocalApplicationData elsewhere).
    /// </summary>
    public static VideoDecoder Default { get; } = new(Path.Combine(
        Path.GetDirectoryName(Kernels.Cuda.ModuleCompiler.DefaultCache())!, "frames"));

    /// <summary>The frames of a file that are chosen, as files.</summary>
    /// <param name="path">The file.</param>
    /// <param name="choose">Chooses, of how many frames it has and how many of a second.</param>
    /// <exception cref="InputException">It cannot be decoded.</exception>
    public (ChosenFrames Chosen, string[] Paths) Decode(
        string path, Func<int, double?, ChosenFrames> choose)
    {
        MustBeVideo(path);
        var (total, rate) = Probe(path);
        ChosenFrames chosen = choose(total, rate);
        // A frame may be taken twice.
        int[] frames = [.. chosen.Frames.Distinct().Order()];
        string folder = Folder(path, frames);
        if (!Directory.Exists(folder)) Write(path, frames, folder);
        return (chosen, [.. chosen.Frames.Select(frame =>
            Name(folder, Array.BinarySearch(frames, frame) + 1))]);
    }

    // Of what somebody sent: containers alone, as playlists name other files.
    private static readonly string[] s_containers =
    [
        "-protocol_whitelist", "file", "-format_whitelist",
        "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,webp_pipe",
    ];

    /// <summary>The same for content that somebody sent: files lie in that folder, and no program
    /// may take longer.</summary>
    internal VideoDecoder In(string folder, int mostSeconds) =>
        new(folder, ffmpeg, ffprobe) { MostSeconds = mostSeconds };

    private int? MostSeconds { get; init; }

    private string[] Guards => MostSeconds is null ? [] : s_containers;

    /// <summary>The path of a file with that content.</summary>
    public string Store(byte[] content)
    {
        string path = Path.Combine(
            cache, Convert.ToHexStringLower(SHA256.HashData(content).AsSpan(0, 12)) + ".video");
        if (!File.Exists(path)) Keep(path, content);
        return path;
    }

    private void Keep(string path, byte[] content)
    {
        try
        {
            Directory.CreateDirectory(cache);
            string temporary =
                $"{path}.{Environment.ProcessId}.{Environment.CurrentManagedThreadId}.tmp";
            File.WriteAllBytes(temporary, content);
            File.Move(temporary, path, overwrite: true);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new RunException(
                $"{path}: cannot write: {Messages.OneLine(failure.Message)}", failure);
        }
    }

    private static void MustBeVideo(string path)
    {
        PictureInfo picture;
        try
        {
            picture = PictureDecoder.Probe(path);
        }
        catch (InputException)
        {
            return;
        }

        // These two may move.
        if (picture.Format is not (PictureFormat.Gif or PictureFormat.WebP))
            throw new InputException($"{path}: is a picture, expected a video file or a folder of "
                + "frames; frames are a list, \"video\": [\"1.png\", \"2.png\"]");
    }

    private (int Frames, double Rate) Probe(string path)
    {
        // Counted by decoding, as what headers say is often another number; once, as that takes
        // long.
        string known = Folder(path, []) + ".json";
        if (File.Exists(known)) return Read(File.ReadAllText(known), path);
        string said = Run(ffprobe, path, [.. Guards, "-v", "error", "-select_streams", "v:0",
            "-count_frames", "-show_entries", "stream=nb_read_frames,avg_frame_rate", "-of", "json",
            Path.GetFullPath(path)]);
        var found = Read(said, path);
        Keep(known, Encoding.UTF8.GetBytes(said));
        return found;
    }

    private static (int Frames, double Rate) Read(string said, string path)
    {
        try
        {
            using var json = JsonDocument.Parse(said);
            JsonElement stream = json.RootElement.GetProperty("streams")[0];
            string[] rate = stream.GetProperty("avg_frame_rate").GetString()!.Split('/');
            int frames = int.Parse(
                stream.GetProperty("nb_read_frames").GetString()!, CultureInfo.InvariantCulture);
            double of = double.Parse(rate[0], CultureInfo.InvariantCulture)
                / (rate.Length > 1 ? double.Parse(rate[1], CultureInfo.InvariantCulture) : 1);
            if (frames > 0 && double.IsFinite(of) && of > 0) return (frames, of);
        }
        catch (Exception failure) when (failure is JsonException or KeyNotFoundException
            or FormatException or OverflowException or InvalidOperationException
            or IndexOutOfRangeException or NullReferenceException)
        {
            // Said below.
        }

        throw new InputException($"{path}: ffprobe finds no frames of a video in it");
    }

    // By the file as it is now and by the frames.
    private string Folder(string path, int[] frames)
    {
        var file = new FileInfo(path);
        string key = $"{file.FullName}\n{file.Length}\n{file.LastWriteTimeUtc.Ticks}\n"
            + string.Join(' ', frames);
        return Path.Combine(cache, Convert.ToHexStringLower(
            SHA256.HashData(Encoding.UTF8.GetBytes(key)).AsSpan(0, 12)));
    }

    private static string Name(string folder, int number) =>
        Path.Combine(folder, $"{number:D6}.png");

    private void Write(string path, int[] frames, string folder)
    {
        string temporary =
            $"{folder}.{Environment.ProcessId}.{Environment.CurrentManagedThreadId}.tmp";
        try
        {
            if (Directory.Exists(temporary)) Directory.Delete(temporary, recursive: true);
            Directory.CreateDirectory(temporary);
            int first = 1;
            foreach (int[] some in frames.Chunk(MostAtOnce))
            {
                string wanted = string.Join('+', some.Select(frame => $"eq(n\\,{frame})"));
                // One output frame for each that is selected, whatever its time was.
                Run(ffmpeg, path, [.. Guards, "-v", "error", "-nostdin", "-i",
                    Path.GetFullPath(path), "-map", "0:v:0", "-vf",
                    $"select={wanted},setpts=N/(25*TB)", "-r", "25", "-pix_fmt", "rgb24",
                    "-start_number", $"{first}", "-f", "image2",
                    Path.Combine(temporary, "%06d.png")]);
                first += some.Length;
            }

            int written = Directory.GetFiles(temporary).Length;
            if (written != frames.Length)
                throw new InputException($"{path}: ffmpeg decodes {written} of {frames.Length} "
                    + "frames: the file is damaged");
            if (!Directory.Exists(folder)) Directory.Move(temporary, folder);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            // Another thread or process may have been quicker.
            if (!Directory.Exists(folder))
                throw new RunException($"{folder}: cannot write the frames of {path}: "
                    + Messages.OneLine(failure.Message), failure);
        }
        finally
        {
            if (Directory.Exists(temporary)) Directory.Delete(temporary, recursive: true);
        }
    }

    private string Run(string program, string path, string[] arguments)
    {
        string name = Path.GetFileName(program);
        MemoryStream said = OutsideProgram.Run(program, name, arguments, [], path,
            "video files are decoded by ffmpeg and ffprobe, and there is no "
            + $"{name} on this machine: install them, or write the frames to a folder and name "
            + "that",
            MostSeconds);
        return Encoding.UTF8.GetString(said.GetBuffer().AsSpan(0, (int)said.Length));
    }
}
