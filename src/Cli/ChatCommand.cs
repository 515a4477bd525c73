using System.Globalization;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Cli;

/// <summary>cpmx chat MODEL [--adapter DIR] [--image FILE] ...</summary>
internal sealed class ChatCommand : IDisposable
{
    private const string Usage = """
        usage: cpmx chat MODEL [--adapter DIR] [--image FILE ...] [--video FILE|FOLDER ...]
                         [--audio FILE ...] [--system TEXT] [--think] [--name value ...]

        Asks a model, with an adapter that cpmx or PEFT wrote, in a conversation. Without a terminal
        each line that comes in is a question, and only answers go out. Ctrl-C stops an answer.

          --adapter DIR   folder with adapter_config.json and adapter_model.safetensors
          --image FILE    shown with the first question; may be given several times
          --video PATH    a video: a file (ffmpeg decodes it) or a folder of frames; several too
          --audio FILE    heard with the first question (MiniCPM-o); several times too
          --system TEXT   system prompt
          --think         let the model think first, if it can; thoughts are folded
        """;

    private const string Commands = """
        /image FILE    show a picture with the next question
        /video PATH    show a video, a file or a folder of frames, with the next question
        /audio FILE    let the next question hear a sound (with --audio, or --init_audio true)
        /reset         begin anew
        /base          the last question again, without the adapter
        /system TEXT   another system prompt; nothing for the model's own
        /think         let the model think first, or not any more
        /help          these lines
        /exit          leave (as Ctrl-D)
        A line that ends with \ goes on.
        """;

    private readonly TextReader _input;
    private readonly TextWriter _output, _error;
    private readonly ChatSession _session;
    private readonly bool _adapted, _terminal;
    private readonly PosixSignalRegistration _signal;
    private volatile bool _answering, _stopped;

    private ChatCommand(TextReader input, TextWriter output, TextWriter error,
        ChatSession session, bool adapted, bool terminal)
    {
        (_input, _output, _error) = (input, output, error);
        (_session, _adapted, _terminal) = (session, adapted, terminal);
        _signal = PosixSignalRegistration.Create(PosixSignal.SIGINT, context =>
        {
            // A second one ends at once, as one does while nothing is answered.
            context.Cancel = _answering && !_stopped;
            _stopped = true;
        });
    }

    public static int Run(string[] args, bool help, TextReader input, TextWriter output,
        TextWriter error, Runners runners, bool terminal)
    {
        if (help)
        {
            output.WriteLine(Usage);
            output.Write(TrainWriter.HelpOfAsking());
            return 0;
        }

        var own = new OwnOptions(
            args, ["--adapter", "--image", "--video", "--audio", "--system"], ["--think"]);
        if (own.Rest.Length == 0 || own.Rest[0].StartsWith('-'))
            throw new InputException("chat: the folder of a model is missing: cpmx chat MODEL");
        var (model, maker, settings) = Open(own, runners, error);
        using var opened = model;
        var session = new ChatSession(model, maker, settings)
        {
            System = own.Text("--system"),
            Thinks = own.Has("--think"),
        };
        foreach (string picture in own.All("--image")) session.Show(picture);
        foreach (string video in own.All("--video")) session.Watch(video);
        foreach (string sound in own.All("--audio")) session.Hear(sound);
        if (terminal)
            output.WriteLine($"{model.Model.Spec.Family} on {model.Model.DeviceName}"
                + (model.Adapter is { } adapter ? $", adapter {adapter}" : "")
                + "; /help lists the commands");
        using var chat = new ChatCommand(
            input, output, error, session, model.Adapter is not null, terminal);
        return chat.Run();
    }

    public void Dispose() => _signal.Dispose();

    /// <summary>The model of MODEL [--adapter DIR], to be asked as the options say.</summary>
    internal static (AskedModel, PromptMaker, GenerationSettings) Open(
        OwnOptions own, Runners runners, TextWriter error)
    {
        TrainArguments read = TrainReader.ReadAsking(
            own.Rest[1..], Environment.CurrentDirectory, out var given);
        TrainArguments arguments = read with
        {
            ModelNameOrPath = Path.GetFullPath(own.Rest[0]),
            InitAudio = read.InitAudio || own.All("--audio").Any(),
            // Weights are bfloat16 on a GPU unless something else is asked for.
            Bf16 = given.Contains("bf16") || given.Contains("fp16") ? read.Bf16 : true,
        };
        AskedModel model = runners.Ask(arguments, own.Text("--adapter"), error.WriteLine);
        try
        {
            return (model,
                new PromptMaker(model.Model.Spec, model.Rows, given.Contains("max_slice_nums")
                    ? arguments.MaxSliceNums : model.TrainedSlices, model.Videos(arguments)),
                GenerationSettings.Of(
                    arguments, model.Model.Spec, model.Rows.Prompts.StopIds, chats: true));
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    private int Run()
    {
        while (Question() is { } line)
        {
            try
            {
                if (line.StartsWith('/') && !Obey(line)) return 0;
                if (!line.StartsWith('/') && line.Trim().Length > 0)
                    Say((tell, goesOn) => _session.Ask(line, tell, goesOn));
            }
            catch (InputException problem) when (_terminal)
            {
                _error.WriteLine(Messages.Visible(problem.Message));
            }
        }

        if (_terminal) _output.WriteLine();
        return 0;
    }

    private string? Question()
    {
        if (_terminal) _output.Write("> ");
        _output.Flush();
        string? line = _input.ReadLine();
        while (line?.EndsWith('\\') == true)
            line = line[..^1] + "\n" + _input.ReadLine();
        return line;
    }

    // False at the end.
    private bool Obey(string line)
    {
        string[] words = line.Split(' ', 2, StringSplitOptions.TrimEntries);
        string rest = words.Length > 1 ? words[1] : "";
        switch (words[0])
        {
            case "/image":
                PromptPicture picture = _session.Show(rest);
                if (_terminal)
                    _output.WriteLine($"{rest}: {Messages.Number(picture.Plan.Views)} view(s), "
                        + "shown with the next question");
                break;
            case "/video":
                IReadOnlyList<PromptPicture> frames = _session.Watch(rest);
                if (_terminal)
                    _output.WriteLine($"{rest}: {Messages.Number(Frames(frames))} frame(s), "
                        + "shown with the next question");
                break;
            case "/audio":
                double seconds = _session.Hear(rest);
                if (_terminal)
                    _output.WriteLine(FormattableString.Invariant(
                        $"{rest}: {seconds:0.0} s, heard with the next question"));
                break;
            case "/reset":
                _session.Reset();
                break;
            case "/base" when !_adapted:
                throw new InputException("/base: there is no adapter to leave out");
            case "/base" when !_session.HasAnswer:
                throw new InputException("/base: nothing has been asked yet");
            case "/base":
                Say(_session.AskBase);
                break;
            case "/system":
                _session.System = rest.Length > 0 ? rest : null;
                break;
            case "/think":
                _session.Thinks = !_session.Thinks;
                if (_terminal) _output.WriteLine(_session.Thinks ? "thinks first" : "no thoughts");
                break;
            case "/help":
                _output.WriteLine(Commands);
                break;
            case "/exit" or "/quit":
                return false;
            default:
                throw new InputException(
                    $"{words[0]}: no such command; /help lists them");
        }

        return true;
    }

    private static int Frames(IReadOnlyList<PromptPicture> shown) =>
        shown.Sum(frame => 1 + frame.Joined.Count);

    private void Say(Func<Action<string>, Func<bool>, ChatAnswer> ask)
    {
        var fold = new ThoughtFold();
        bool told = false;
        _stopped = false;
        _answering = true;
        ChatAnswer answer;
        try
        {
            answer = ask(Tell, () => !_stopped);
        }
        finally
        {
            _answering = false;
        }

        _output.WriteLine(fold.End());
        if (!_terminal) return;
        double rate = (answer.Tokens - 1) / Math.Max(1e-9, answer.Seconds - answer.FirstSeconds);
        _output.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"[{answer.Tokens} tokens after {answer.PromptTokens}, {answer.FirstSeconds:0.0} s + ")
            + string.Create(CultureInfo.InvariantCulture, $"{rate:0} tokens/s")
            + (answer.Ended ? "]" : _stopped ? ", stopped]" : ", cut by max_new_tokens]"));

        void Tell(string piece)
        {
            string shown = fold.Add(piece);
            if (_terminal && fold.IsThinking && !told)
            {
                told = true;
                _output.WriteLine("(thinks)");
            }

            _output.Write(shown);
            _output.Flush();
        }
    }
}
