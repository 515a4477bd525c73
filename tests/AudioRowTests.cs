using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;
using static MiniCpmNative.Tests.SafetensorsTests;

namespace MiniCpmNative.Tests;

/// <summary>Rows with sounds: how they are named, where they lie, training on them.</summary>
[TestFixture]
public sealed class AudioRowTests
{
    // Numbers of samples and texts, "u" for <unk>, of the official processor with a pooling of 5.
    private static readonly (int Samples, string Whole, string Seconds)[] s_places =
    [
        (16000, "<|audio_start|>uuuuuuuuuu<|audio_end|>", "<|audio_start|>uuuuuuuuuu<|audio_end|>"),
        (22000, "<|audio_start|>uuuuuuuuuuuuu<|audio_end|>",
            "<|audio_start|>uuuuuuuuuu<|audio_end|><|audio_start|>uuu<|audio_end|>"),
        (40000, "<|audio_start|>uuuuuuuuuuuuuuuuuuuuuuuuu<|audio_end|>",
            "<|audio_start|>uuuuuuuuuu<|audio_end|><|audio_start|>uuuuuuuuuu<|audio_end|>"
            + "<|audio_start|>uuuuu<|audio_end|>"),
    ];

    private string _folder = "", _data = "";
    private ModelSpec _spec = null!;

    [OneTimeSetUp]
    public void MakeModel()
    {
        _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;
        _data = Path.Combine(_folder, "rows.json");
        AudioModel.Write(_folder);
        _spec = ModelSpec.Read(_folder).Hearing(true);
        File.WriteAllBytes(Path.Combine(_folder, "a.wav"), AudioModel.Wav(16000));
        File.WriteAllBytes(Path.Combine(_folder, "b.wav"), AudioModel.Wav(22000, seed: 2));
    }

    [OneTimeTearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void PlacesAreThoseOfTheOfficialProcessor()
    {
        SoundScheme whole = _spec.Rows().Sounds!;
        string folder = Directory.CreateDirectory(Path.Combine(_folder, "seconds")).FullName;
        SoundScheme seconds = AudioModel.Describe(folder, config => config["chunk_input"] = true)
            .Rows().Sounds!;
        foreach (var (samples, text, cut) in s_places)
        {
            Assert.That(whole.Text(samples).Replace("<unk>", "u"), Is.EqualTo(text));
            Assert.That(seconds.Text(samples).Replace("<unk>", "u"), Is.EqualTo(cut));
        }

        // The model's clips have 320 frames, 3.2 s; the last piece of this is 90 frames.
        Assert.That(whole.Tokens(3 * 51200 + 14400), Is.EqualTo((3 * 32) + 9));
        Assert.That(whole.Tokens(1400), Is.EqualTo(1));
        Assert.That(whole.Tokens(1280), Is.EqualTo(0));
    }

    [Test]
    public void EveryWayToNameASoundIsRead()
    {
        string uri = "data:audio/wav;base64,"
            + Convert.ToBase64String(File.ReadAllBytes(Path.Combine(_folder, "a.wav")));
        string bare = uri[(uri.IndexOf(',') + 1)..];
        string[] rows =
        [
            """{"audio": "a.wav", "conversations": [U, A]}""",
            """{"audio": ["a.wav"], "conversations": [T, A]}""",
            $$"""{"audio": "{{uri}}", "conversations": [T, A]}""",
            $$"""{"audio": {"bytes": "{{bare}}", "path": "x.wav"}, "conversations": [T, A]}""",
            """{"audios": ["a.wav"], "messages": [T, A]}""",
            """{"audios": "a.wav", "query": "<audio>\nWhat?", "response": "Tones."}""",
            """
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"},
                {"type": "text", "text": "\nWhat?"}]}, A]}
            """,
            """
            {"messages": [{"role": "user", "content": [{"type": "audio_url",
                "audio_url": {"url": "a.wav"}}, {"type": "text", "text": "\nWhat?"}]}, A]}
            """,
            $$"""
            {"messages": [{"role": "user", "content": [{"type": "input_audio",
                "input_audio": {"data": "{{bare}}", "format": "wav"} },
                {"type": "text", "text": "\nWhat?"}]}, A]}
            """,
        ];
        Sample? first = null;
        Batch? heard = null;
        foreach (string row in rows)
        {
            DataRows data = Rows(row);
            Sample sample = data.Sample(0);
            first ??= sample;
            Assert.That(sample.InputIds, Is.EqualTo(first.InputIds), row);
            var batch = new Batch();
            batch.Clear();
            data.Append(0, batch);
            heard ??= batch;
            Assert.That(batch.Clip(0).SequenceEqual(heard.Clip(0)), row);
        }

        var tokenizer = _spec.Rows().Tokenizer;
        Assert.That(tokenizer.Decode(first!.InputIds), Does.Contain("user\n"
            + s_places[0].Whole.Replace("u", "<unk>").Replace("a<unk>dio", "audio")
            + "\nWhat?<|im_end|>"));
        ImageBound place = first.SoundBounds.Single();
        Assert.That(place.End - place.Start, Is.EqualTo(10));
        Assert.That(first.InputIds[place.Start..place.End].Distinct(),
            Is.EqualTo(new[] { _spec.Rows().Placeholders.UnknownId }));
        Assert.That(first.Labels[(place.Start - 1)..place.End].Distinct(),
            Is.EqualTo(new[] { -100 }));
        Assert.That(heard!.SoundSlots.Span.ToArray(),
            Is.EqualTo(Enumerable.Range(place.Start, 10)));
        Assert.That((heard.Clips, heard.ClipFrames(0)), Is.EqualTo((1, 100)));
    }

    [Test]
    public void SoundsAreHeardWhereTheirTagsStand()
    {
        DataRows data = Rows("""
            {"audio": ["a.wav", "b.wav"], "conversations": [
                {"role": "user", "content": "First <audio>."}, A,
                {"role": "user", "content": "<audio>, then?"}, A]}
            """, """{"conversations": [U, A]}""");
        Sample sample = data.Sample(0);
        Assert.That(sample.SoundBounds.Select(b => b.End - b.Start), Is.EqualTo(new[] { 10, 13 }));
        Assert.That(_spec.Rows().Tokenizer.Decode(sample.InputIds),
            Does.Contain("First <|audio_start|>").And.Contain("<|audio_end|>, then?"));
        var batch = new Batch();
        batch.Clear();
        data.Append(1, batch);
        data.Append(0, batch);
        Assert.That((batch.Clips, batch.ClipFrames(0), batch.ClipFrames(1)),
            Is.EqualTo((2, 100, 138)));
        int start = batch.SequenceStarts[1];
        Assert.That(batch.SoundSlots.Span.ToArray(), Is.EqualTo(sample.SoundBounds
            .SelectMany(b => Enumerable.Range(start + b.Start, b.End - b.Start))));
        // The prompt of an earlier answer has what is heard by then.
        RowPrompt prompt = Rows("""
            {"audio": ["a.wav"], "conversations": [{"role": "user", "content": "<audio>"}, A]}
            """).Prompt(0);
        batch.Clear();
        prompt.Append(batch, 0, prompt.Tokens);
        Assert.That((batch.Clips, batch.SoundSlots.Count, prompt.Pictures.Count),
            Is.EqualTo((1, 10, 1)));
    }

    [TestCase("""{"audio": "none.wav", "conversations": [U, A]}""",
        "sound \"none.wav\" is neither in the data file's folder nor in the working directory")]
    [TestCase("""{"audio": "http://x/a.wav", "conversations": [U, A]}""",
        "sound \"http://x/a.wav\" is an address on the network")]
    [TestCase("""{"audio": "a.wav", "audios": ["a.wav"], "conversations": [U, A]}""",
        "has sounds under both \"audio\" and \"audios\"")]
    [TestCase("""{"audio": ["a.wav", "b.wav"], "conversations": [T, A]}""",
        "1 <audio> tags for 2 sound(s): each sound is heard once")]
    [TestCase("""{"conversations": [T, A]}""", "has the tag <audio>, but the row has no \"audio\"")]
    [TestCase("""
        {"audio": "a.wav", "conversations": [U, {"role": "assistant", "content": "<audio>"}]}
        """, "the tag <audio> stands in an answer")]
    [TestCase("""{"audio": "config.json", "conversations": [U, A]}""",
        "config.json: is no sound file that is known")]
    [TestCase("""{"audio": "short.wav", "conversations": [U, A]}""",
        "sound \"short.wav\" has 800 samples at 16,000 Hz, which is too short to be heard")]
    [TestCase("""{"audio": "data:image/png;base64,AAAA", "conversations": [U, A]}""",
        "is given \"image/png\" as a sound")]
    [TestCase("""{"image": "data:audio/wav;base64,AAAA", "conversations": [U, A]}""",
        "is given \"audio/wav\" as a picture")]
    [TestCase("""
        {"audio": "a.wav", "conversations": [{"role": "user", "content": "<|audio_start|>"}, A]}
        """,
        "the text holds the special token <|audio_start|>")]
    public void WhatIsWrongIsToldInWords(string row, string expected)
    {
        File.WriteAllBytes(Path.Combine(_folder, "short.wav"), AudioModel.Wav(800));
        Assert.That(() => Opened(Arguments, row), Refuses(expected));
    }

    [Test]
    public void SoundsThatNobodyHearsAreRefused()
    {
        const string Row = """{"audio": "a.wav", "conversations": [U, A]}""";
        Assert.That(() => Opened(Arguments with { InitAudio = false }, Row), Refuses(
            "has audio, which the model does not hear in this run: init_audio=true"));
        Assert.That(() => Opened(Arguments with { OfficialCompat = true }, Row),
            Refuses("has audio, which the official script cannot read"));
        Assert.That(() => Opened(Arguments with { ModelMaxLength = 14 }, Row),
            Refuses("its audio would be cut; raise model_max_length"));
    }

    // The encoder is frozen where nothing is said; what is heard decides the loss.
    [Test]
    public void AdaptersLearnFromWhatIsHeard()
    {
        TrainArguments arguments = Arguments with
        {
            DataPath = Write("""{"audio": "a.wav", "conversations": [U, A]}""",
                """
                {"audio": "b.wav", "conversations": [U,
                    {"role": "assistant", "content": "Others."}]}
                """),
            OutputDir = Path.Combine(_folder, "out"),
            PerDeviceTrainBatchSize = 2,
            MaxSteps = 8,
            LoggingSteps = new(1),
            LearningRate = 1e-2,
        };
        Runs.Train(arguments);
        double[] losses = [.. Runs.Losses(arguments)];
        Assert.That(losses[^1], Is.LessThan(0.7 * losses[0]));
        using var model = TunedModel.Open(arguments);
        Assert.That(model.ParameterRanges.List.Select(t => t.Name), Has.All.StartWith("llm."));
        Assert.That(Loss("a.wav"), Is.Not.EqualTo(Loss("b.wav")).Within(1e-4));

        double Loss(string sound)
        {
            File.Copy(Path.Combine(_folder, sound), Path.Combine(_folder, "x.wav"), true);
            // The same length, so that nothing but the sound differs.
            if (sound == "b.wav")
                File.WriteAllBytes(Path.Combine(_folder, "x.wav"), AudioModel.Wav(16000, seed: 3));
            var batch = new Batch();
            batch.Clear();
            Rows("""{"audio": "x.wav", "conversations": [U, A]}""").Append(0, batch);
            return Trace.Run(model, batch, gradients: false).Floats["loss"].Values[0];
        }
    }

    [Test]
    public void TheEncoderLearnsWhereItIsAskedTo()
    {
        TrainArguments arguments = Arguments with
        {
            UseLora = false,
            TuneAudio = true,
            TuneVision = false,
            DataPath = Write("""{"audio": "a.wav", "conversations": [U, A]}"""),
            OutputDir = Path.Combine(_folder, "full"),
            MaxSteps = 2,
            LearningRate = 1e-2,
        };
        Runs.Train(arguments);
        using var before = Engine.Weights.Checkpoint.Open(_folder);
        using var after = Engine.Weights.Checkpoint.Open(arguments.OutputDir);
        Assert.That(after.Tensors.Select(t => t.Name),
            Is.EquivalentTo(before.Tensors.Select(t => t.Name)));
        foreach (var (name, changes) in new[]
        {
            ("apm.conv1.weight", true), ("apm.layers.1.fc2.bias", true),
            ("audio_projection_layer.linear2.weight", true),
            ("apm.embed_positions.weight", false), ("vpm.post_layernorm.weight", false),
        })
            Assert.That(after.Get(name).ToFloats(), changes
                ? Is.Not.EqualTo(before.Get(name).ToFloats())
                : Is.EqualTo(before.Get(name).ToFloats()), name);
    }

    // A row of all kinds beside one of sound and one of text.
    [Test]
    public void PicturesAndSoundsStandInOneRow()
    {
        string picture = Path.Combine(ReferenceModel.Of("o45").Folder, "data", "images");
        picture = Directory.GetFiles(picture).Order().First();
        DataRows data = Rows(
            $$"""{"image": "{{picture}}", "audio": ["a.wav"], "conversations": [U, A]}""",
            """{"audio": "a.wav", "conversations": [T, A]}""", """{"conversations": [U, A]}""");
        string text = _spec.Rows().Tokenizer.Decode(data.Sample(0).InputIds);
        Assert.That(text, Does.Match("user\n<image_id>0.*</(image|slice)>\n<\\|audio_start\\|>"
            + "(<unk>){10}<\\|audio_end\\|>\nWhat\\?"));
        using var model = TunedModel.Open(Arguments);
        var losses = new List<double>();
        foreach (int[] rows in (int[][])[[0, 1, 2], [0], [1], [2]])
        {
            var batch = new Batch();
            batch.Clear();
            foreach (int row in rows) data.Append(row, batch);
            losses.Add(V26.Gradients(model, Arguments, batch).Loss);
        }

        // All answers are of one length.
        Assert.That(losses[0], Is.EqualTo(losses[1..].Average()).Within(1e-5));
    }

    [Test]
    public void ConvertedRowsKeepTheirSounds()
    {
        string bare = Convert.ToBase64String(File.ReadAllBytes(Path.Combine(_folder, "b.wav")));
        string data = Write("""{"audios": ["a.wav"], "messages": [T, A]}""",
            $$"""{"audios": ["data:audio/wav;base64,{{bare}}"], "messages": [U, A]}""");
        string to = Path.Combine(Directory.CreateDirectory(
            Path.Combine(_folder, "converted")).FullName, "rows.json");
        var output = new StringWriter();
        Assert.That(new DataConvert(data, to, BoxFormat.Text, Skip: false).Run(output), Is.True);
        Assert.That(output.ToString(), Does.Contain("2 rows have sounds (\"audio\")"));
        DataRows before = DataRows.Read(data, Arguments, _spec.Rows());
        DataRows after = DataRows.Read(to, Arguments, _spec.Rows());
        Assert.That(after.OtherFormats, Is.Empty);
        for (int row = 0; row < 2; row++)
            Assert.That(after.Sample(row).InputIds, Is.EqualTo(before.Sample(row).InputIds));
        var check = new StringWriter();
        Assert.That(DataCheck.Run(Arguments with { DataPath = to }, _spec.Rows(), check), Is.True);
        Assert.That(check.ToString(),
            Does.Contain("  sounds: 2").And.Contains("(10 sound features)"));
    }

    [Test]
    public void AConversationHasTheTokensOfItsRow()
    {
        var arguments = Arguments with { UseLora = false };
        using var asked = Engine.Generate.AskedModel.Open(arguments, null);
        var maker = new Engine.Generate.PromptMaker(asked.Model.Spec, asked.Rows);
        float[] heard = maker.Hear(Path.Combine(_folder, "a.wav"));
        var input = maker.Make([new PromptTurn("user", [new PromptPart(null, -1, 0), "What?"])], [],
            enableThinking: true, sounds: [heard]);
        DataRows row = Rows("""{"audio": "a.wav", "conversations": [U, A]}""");
        Sample sample = row.Sample(0);
        int end = sample.SoundBounds[0].End;
        Assert.That(input.Ids.AsSpan(0, end + 1).SequenceEqual(sample.InputIds.AsSpan(0, end + 1)));
        Assert.That(input.Pictures, Is.EqualTo(sample.SoundBounds));
        Assert.That(() => maker.Make([new PromptTurn("user", ["<|audio_start|><|audio_end|><unk>"
            + "<|audio_start|><unk><|audio_end|>"])], []), Refuses("holds audio tokens as text"));
        var (said, other) = (Chat("a.wav"), Chat("b.wav"));
        Assert.That(said, Is.Not.EqualTo(other));
        Assert.That(Chat("a.wav"), Is.EqualTo(said));

        string Chat(string sound)
        {
            var output = new StringWriter();
            Assert.That(Cli.ChatCommand.Run([_folder, "--device", "cpu", "--do_sample", "false",
                "--max_new_tokens", "12", "--audio", Path.Combine(_folder, sound)], help: false,
                new StringReader("What?\n"), output, new StringWriter(), new Cli.Runners(),
                terminal: false), Is.Zero);
            return output.ToString();
        }
    }

    // Beside adapters the encoder learns whole, and merges.
    [Test]
    public void AnEncoderInModulesToSaveIsMerged()
    {
        TrainArguments arguments = Arguments with
        {
            ModulesToSave = ["apm", "audio_projection_layer"],
            DataPath = Write("""{"audio": "a.wav", "conversations": [U, A]}"""),
            OutputDir = Path.Combine(_folder, "saved"),
            MaxSteps = 2,
            LearningRate = 1e-2,
        };
        Runs.Train(arguments);
        string to = Path.Combine(_folder, "merged");
        Engine.Export.MergeRun.Run(new(_folder, arguments.OutputDir, to), TextWriter.Null);
        using var before = Engine.Weights.Checkpoint.Open(_folder);
        using var after = Engine.Weights.Checkpoint.Open(to);
        foreach (string name in (string[])["apm.conv1.weight",
            "llm.model.layers.0.self_attn.q_proj.weight",
            "audio_projection_layer.linear2.bias"])
            Assert.That(after.Get(name).ToFloats(), Is.Not.EqualTo(before.Get(name).ToFloats()),
                name);
        Assert.That(ModelSpec.Read(to).Hearing(true).Parameters.Count,
            Is.EqualTo(_spec.Parameters.Count));
    }

    private TrainArguments Arguments => AudioModel.Lora(_folder, _data);

    private DataRows Rows(params string[] rows) =>
        DataRows.Read(Write(rows), Arguments, _spec.Rows());

    private void Opened(TrainArguments arguments, string row) => DataRows.Open(
        Write(row), arguments, ModelSpec.Read(_folder).Hearing(arguments.InitAudio).Rows(),
            _ => { });

    // U is a question, T the same with a tag, A an answer.
    private string Write(params string[] rows)
    {
        string[] turns =
        [
            """{"role": "user", "content": "What?"}""",
            """{"role": "user", "content": "<audio>\nWhat?"}""",
            """{"role": "assistant", "content": "Tones."}""",
        ];
        File.WriteAllText(_data, "[" + string.Join(",", rows.Select(row => JsonNode.Parse(row
            .Replace("[U,", $"[{turns[0]},").Replace("[T,", $"[{turns[1]},")
            .Replace(" A]", $" {turns[2]}]").Replace(" A,", $" {turns[2]},"))!.ToJsonString()))
                + "]");
        return _data;
    }
}
