using System.Diagnostics;
using MiniCpmNative.Engine.Data;

namespace MiniCpmNative.Engine.Generate;

/// <summary>An answer in a conversation.</summary>
/// <param name="Text">All of it, thoughts included, without white space around.</param>
/// <param name="PromptTokens">Tokens of the conversation before it.</param>
/// <param name="Tokens">Tokens of the answer.</param>
/// <param name="FirstSeconds">Until its first token came.</param>
/// <param name="Seconds">Until it was over.</param>
/// <param name="Ended">Whether it ended by itself: not cut by max_new_tokens or stopped.</param>
public sealed record ChatAnswer(
    string Text, int PromptTokens, int Tokens, double FirstSeconds, double Seconds, bool Ended);

/// <summary>
/// A conversation with a model. What the cache has of it is not run again, so that a turn costs
/// what is new in it.
/// </summary>
public sealed class ChatSession
{
    private readonly AskedModel _model;
    private readonly PromptMaker _maker;
    private readonly Generator _generator;
    private readonly GenerationSettings _settings;
    private readonly List<PromptTurn> _turns = [];
    private readonly List<PromptPicture> _pictures = [];
    private readonly List<float[]> _sounds = [];
    private readonly List<IReadOnlyList<PromptPicture>> _videos = [];
    private readonly List<PromptPart> _pending = [];
    private object _conversation = new();

    public ChatSession(AskedModel model, PromptMaker maker, GenerationSettings settings)
    {
        (_model, _maker, _settings) = (model, maker, settings.Checked());
        _generator = new Generator(model.Model, model.Counter);
        // All that a conversation can need at once: a larger cache later would come on top. Beams
        // begin anew each time, and take what they need.
        if (settings.NumBeams == 1)
            _generator.Reserve(1, maker.MaxTokens + settings.MaxNewTokens);
    }

    /// <summary>In place of the format's system prompt.</summary>
    public string? System { get; set; }

    /// <summary>Whether answers may think first, in models that can.</summary>
    public bool Thinks { get; set; }

    /// <summary>Whether a question has been answered.</summary>
    public bool HasAnswer => _turns.Count > 0;

    /// <summary>Shows a picture with the next question.</summary>
    /// <exception cref="InputException">The file is missing or no picture.</exception>
    public PromptPicture Show(string path)
    {
        if (path.Length == 0) throw new InputException("which picture? A file's name is missing");
        PromptPicture picture = _maker.Open(path);
        _pending.Add(_pictures.Count);
        _pictures.Add(picture);
        return picture;
    }

    /// <summary>Lets the next question hear a sound; its seconds.</summary>
    /// <exception cref="InputException">The file is missing or no sound, or the model does not
    /// hear.</exception>
    public double Hear(string path)
    {
        if (path.Length == 0) throw new InputException("which sound? A file's name is missing");
        float[] samples = _maker.Hear(path);
        _pending.Add(new PromptPart(null, -1, _sounds.Count));
        _sounds.Add(samples);
        return samples.Length / (double)SoundScheme.Rate;
    }

    /// <summary>Shows a video with the next question: a file, or a folder of frames; what is
    /// shown of it.</summary>
    /// <exception cref="InputException">It is missing or no video, or the model takes none.
    /// </exception>
    public IReadOnlyList<PromptPicture> Watch(string path)
    {
        if (path.Length == 0)
            throw new InputException("which video? The name of a file or a folder is missing");
        IReadOnlyList<PromptPicture> frames = _maker.Watch(path);
        _pending.Add(new PromptPart(null, -1, Video: _videos.Count));
        _videos.Add(frames);
        return frames;
    }

    /// <summary>Forgets the conversation; the system prompt stays.</summary>
    public void Reset()
    {
        _turns.Clear();
        _pictures.Clear();
        _sounds.Clear();
        _videos.Clear();
        _pending.Clear();
        _conversation = new();
    }

    /// <summary>Asks, and takes the answer into the conversation.</summary>
    /// <param name="question">The user's turn.</param>
    /// <param name="tell">Takes the answer's text as it comes.</param>
    /// <param name="goesOn">Asked at each token; false ends the answer there.</param>
    /// <exception cref="InputException">The conversation cannot be asked so; nothing has changed.
    /// </exception>
    public ChatAnswer Ask(string question, Action<string> tell, Func<bool> goesOn)
    {
        PromptTurn turn = new("user", [.. _pending, question]);
        ChatAnswer answer = Answer([.. _turns, turn], tell, goesOn);
        _turns.Add(turn);
        _turns.Add(new PromptTurn("assistant", [answer.Text]));
        _pending.Clear();
        return answer;
    }

    /// <summary>
    /// What the model without its adapter answers to the last question; the conversation stays.
    /// </summary>
    public ChatAnswer AskBase(Action<string> tell, Func<bool> goesOn)
    {
        object before = _conversation;
        _model.IsAdapted = false;
        try
        {
            _conversation = new();
            return Answer(_turns[..^1], tell, goesOn);
        }
        finally
        {
            _model.IsAdapted = true;
            _conversation = before;
        }
    }

    private ChatAnswer Answer(
        IReadOnlyList<PromptTurn> turns, Action<string> tell, Func<bool> goesOn)
    {
        GenerationInput input = _maker.Make(
            turns, _pictures, System, Thinks, (ulong)turns.Count, _sounds, _videos);
        var text = new TextStream(_model.Rows.Tokenizer);
        long start = Stopwatch.GetTimestamp();
        double first = 0;
        GeneratedTokens tokens = _generator.Run(
            [input], _settings, Take, goesOn, _conversation)[0];
        if (_settings.NumBeams > 1)
            foreach (int id in tokens.Ids)
                if (!_settings.StopIds.Contains(id)) Say(text.Add(id));
        Say(text.End());
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        return new ChatAnswer(
            PythonText.Strip(text.Text), input.Tokens, tokens.Ids.Length, first, seconds,
            tokens.Stopped);

        bool Take(int _, int id)
        {
            Say(text.Add(id));
            return true;
        }

        void Say(string piece)
        {
            if (first == 0) first = Stopwatch.GetElapsedTime(start).TotalSeconds;
            if (piece.Length > 0) tell(piece);
        }
    }
}
